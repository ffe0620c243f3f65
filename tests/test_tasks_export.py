"""The exported ONNX model is the trained one, preparation included."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedward.tasks import datasets
from fedward.tasks.heart_disease import HEART_DISEASE as TASK
from fedward.tasks.preparation import preparation
from fedward.tasks.task import Table, add_sums

HOSPITALS = tuple(datasets.partitions("heart-disease"))


@pytest.fixture(scope="module")
def tables() -> list[Table]:
    return [datasets.load("heart-disease", partition=hospital) for hospital in HOSPITALS]


def raw_input(tables: list[Table]) -> NDArray[np.float32]:
    columns = [np.concatenate([t.columns[f.name] for t in tables]) for f in TASK.schema.features]
    return np.stack(columns, axis=1).astype(np.float32)


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7, generator=generator)


@pytest.mark.parametrize("name", TASK.models)
@pytest.mark.parametrize("scaling", ["public", "fitted"])
def test_onnx_equals_torch_on_all_920_patients(
    tables: list[Table], name: str, scaling: str
) -> None:
    fitted = TASK.fit(add_sums(map(TASK.statistics, tables))) if scaling == "fitted" else None
    model = TASK.model(name)
    randomise(model, seed=1)
    features = np.concatenate([TASK.prepare(table, fitted).features for table in tables])
    expected = TASK.probabilities(model(torch.from_numpy(features))).numpy()

    session = onnxruntime.InferenceSession(TASK.export_onnx(model, fitted))
    (served,) = session.run(["probability"], {"input": raw_input(tables)})

    assert served.shape == (920, 1)
    assert served.dtype == np.float32
    assert expected.std() > 0.1
    np.testing.assert_allclose(served[:, 0], expected, atol=1e-6, rtol=0)


def test_a_patient_of_whom_nothing_is_known_gets_a_probability() -> None:
    model = TASK.model("logistic")
    randomise(model, seed=2)
    session = onnxruntime.InferenceSession(TASK.export_onnx(model, None))
    nothing = np.full((1, len(TASK.schema.features)), np.nan, dtype=np.float32)

    (probability,) = session.run(None, {"input": nothing})

    assert 0 < float(probability[0, 0]) < 1


@pytest.mark.parametrize("scaling", ["public", "fitted"])
def test_what_no_range_allows_is_cut_and_infinity_too(tables: list[Table], scaling: str) -> None:
    fitted = TASK.fit(add_sums(map(TASK.statistics, tables))) if scaling == "fitted" else None
    model = TASK.model("mlp")
    randomise(model, seed=3)
    session = onnxruntime.InferenceSession(TASK.export_onnx(model, fitted))
    rows = raw_input(tables)[:200]
    numbers = [i for i, field in enumerate(TASK.schema.features) if field.kind == "number"]
    rng = np.random.default_rng(4)
    odd = np.array([np.inf, -np.inf, 1e30, -1e30, np.nan], np.float32)
    rows[:, numbers] = rng.choice(odd, (200, len(numbers)))
    table = Table(
        source="odd",
        patient_ids=tuple(map(str, range(200))),
        columns={
            **{f.name: rows[:, i].astype(float) for i, f in enumerate(TASK.schema.features)},
            TASK.schema.label.name: np.zeros(200),
        },
    )
    features = TASK.prepare(table, fitted).features

    (served,) = session.run(["probability"], {"input": rows})

    expected = TASK.probabilities(model(torch.from_numpy(features))).numpy()
    np.testing.assert_allclose(served[:, 0], expected, atol=1e-6, rtol=0)


def test_what_is_no_code_is_no_category(tables: list[Table]) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(TASK.prepare(tables[0], None).features.shape[1], 1))
    randomise(model, seed=6)
    session = onnxruntime.InferenceSession(TASK.export_onnx(model, None))
    rows = raw_input(tables)[:300]
    categories = [
        i for i, f in enumerate(TASK.schema.features)
        if f.kind == "category" and len(f.categories) > 2
    ]  # fmt: skip
    codes = np.array([0, 1, 2], np.float32)
    near = [*np.nextafter(codes, np.float32(9)), *np.nextafter(codes[1:], np.float32(-9))]
    odd = np.array([-1, 0.5, *near, 7, np.inf, -np.inf, np.nan], np.float32)
    rows[:, categories] = np.random.default_rng(6).choice(odd, (300, len(categories)))
    features = preparation(TASK.schema, None, gain=TASK.gain).apply(rows.astype(float))

    (served,) = session.run(["probability"], {"input": rows})

    expected = TASK.probabilities(model(torch.from_numpy(features))[:, 0]).numpy()
    np.testing.assert_allclose(served[:, 0], expected, atol=1e-6, rtol=0)


def test_a_graph_has_few_nodes_as_each_costs_a_request_its_time() -> None:
    graph = onnx.load_from_string(TASK.export_onnx(TASK.model("logistic"), None)).graph

    assert len(graph.node) <= 6


def test_a_model_that_begins_with_no_layer_is_exported_too(tables: list[Table]) -> None:
    features = TASK.prepare(tables[0], None).features
    model = nn.Sequential(nn.ReLU(), nn.Linear(features.shape[1], 1))
    randomise(model, seed=5)
    session = onnxruntime.InferenceSession(TASK.export_onnx(model, None))

    (served,) = session.run(["probability"], {"input": raw_input(tables[:1])})

    expected = TASK.probabilities(model(torch.from_numpy(features))[:, 0]).numpy()
    np.testing.assert_allclose(served[:, 0], expected, atol=1e-6, rtol=0)


def test_the_same_model_is_exported_to_the_same_bytes() -> None:
    model = TASK.model("mlp")

    assert TASK.export_onnx(model, None) == TASK.export_onnx(model, None)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(32, 1), nn.Tanh()),
        nn.Sequential(nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(32, 2)),
        nn.Tanh(),
    ],
)
def test_a_model_that_cannot_be_exported_faithfully_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"ONNX form|features|output"):
        TASK.export_onnx(model, None)
