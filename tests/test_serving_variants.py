"""A smaller form of a model is served only where it is faster and says the same."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from release_samples import MODEL, release_files, sigmoid_of, valid_inputs

from fedward.core.errors import ReleaseRejected
from fedward.core.identity import Identity
from fedward.core.release import Release, read_release
from fedward.core.study import parse_study
from fedward.server.publisher import publish
from fedward.server.registry import Registry
from fedward.server.variants import half_precision, make_variants, measure_variants
from fedward.serving import engine as engine_module
from fedward.serving.engine import start_engine
from fedward.tasks.parameters import to_vector
from fedward.tasks.registry import get_task

_IDENTITY = Identity.generate_publisher()


def _release(folder: Path, variant: bytes, *, slow: bool = False) -> Release:
    def build(version: int) -> dict[str, bytes]:
        files = release_files(version)
        if slow:
            files["model.onnx"] = _slowed(files["model.onnx"])
        return {**files, "variants/int8.onnx": variant}

    added = Registry(folder).add(MODEL, build, identity=_IDENTITY)
    return read_release(added, _IDENTITY.public)


def _slowed(model: bytes, *, by: float = 0.0) -> bytes:
    """The same answers (but for `by`) after a large product with zero."""
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    size = 400
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((4, size), np.float32), "wide"),
            numpy_helper.from_array(np.zeros((size, size), np.float32), "square"),
            numpy_helper.from_array(np.full((size, 1), 0, np.float32), "narrow"),
            numpy_helper.from_array(np.array([by], np.float32), "by"),
        ]
    )
    last = graph.node[-1]
    last.output[0] = "before"
    graph.node.extend(
        [
            helper.make_node("MatMul", ["filled", "wide"], ["w"]),
            helper.make_node("MatMul", ["w", "square"], ["s"]),
            helper.make_node("MatMul", ["s", "square"], ["t"]),
            helper.make_node("MatMul", ["t", "narrow"], ["n"]),
            helper.make_node("Add", ["before", "n"], ["sum"]),
            helper.make_node("Add", ["sum", "by"], ["probability"]),
        ]
    )
    return bytes(loaded.SerializeToString())


def _chosen(release: Release) -> str:
    return next(one.name for one in start_engine(release).measured if one.chosen)


def test_a_faster_variant_that_says_the_same_is_served(tmp_path: Path) -> None:
    release = _release(tmp_path, release_files()["model.onnx"], slow=True)

    assert _chosen(release) == "variants/int8.onnx"


def test_a_slower_variant_is_not_served(tmp_path: Path) -> None:
    release = _release(tmp_path, _slowed(release_files()["model.onnx"]))

    assert _chosen(release) == "model.onnx"


def test_a_variant_that_says_something_else_is_not_served(tmp_path: Path) -> None:
    variant = release_files(bias=-1.9)["model.onnx"]
    release = _release(tmp_path, variant, slow=True)

    engine = start_engine(release)

    assert next(one.name for one in engine.measured if one.chosen) == "model.onnx"
    assert engine.measured[1].off > engine_module.VARIANT_TOLERANCE
    inputs = valid_inputs(5)
    np.testing.assert_allclose(engine.predict(inputs), sigmoid_of(inputs), atol=1e-6)


def test_a_variant_that_does_not_run_is_refused_with_its_release(tmp_path: Path) -> None:
    with pytest.raises(ReleaseRejected, match="int8"):
        start_engine(_release(tmp_path, b"no graph"))


def _large(*, scale: float = 0.05) -> bytes:
    """A net of two products on four clinical fields, one of them far beyond float16."""
    rng = np.random.default_rng(0)
    shapes = ((4, 500), (500, 1))
    weights = [(rng.normal(size=shape) * scale).astype(np.float32) for shape in shapes]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input", "scale"], ["x"]),
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "b"], ["s"]),
            helper.make_node("Sigmoid", ["s"], ["probability"]),
        ],
        "large",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [
            numpy_helper.from_array(np.array([1, 1, 1e-2, 1e-6], np.float32), "scale"),
            *(numpy_helper.from_array(w, name) for w, name in zip(weights, "ab", strict=True)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


_LARGE_INPUTS = np.array([[1, 0, 300, 900_000], [0, 1, 50, 100_000]], np.float32)


def test_a_small_model_has_no_variants_and_a_large_one_has_both() -> None:
    model = _large()

    assert make_variants(model, num_parameters=100) == {}
    variants = make_variants(model, num_parameters=5000)

    nodes = {name: onnx.load_from_string(data).graph.node for name, data in variants.items()}
    assert sorted(nodes) == ["variants/fp16.onnx", "variants/int8.onnx"]
    assert "MatMulInteger" in {node.op_type for node in nodes["variants/int8.onnx"]}
    assert len(variants["variants/fp16.onnx"]) < 0.7 * len(model)
    half = onnx.load_from_string(variants["variants/fp16.onnx"]).graph.initializer
    types = {tensor.name: tensor.data_type for tensor in half}
    assert types == {
        "a": TensorProto.FLOAT16,
        "b": TensorProto.FLOAT16,
        "scale": TensorProto.FLOAT,  # what prepares clinical values keeps their range
    }


def test_half_precision_gives_the_models_answers_for_values_beyond_its_range() -> None:
    model = _large()
    half = half_precision(model)
    assert half is not None

    def run(form: bytes) -> NDArray[np.float32]:
        session = onnxruntime.InferenceSession(form, providers=["CPUExecutionProvider"])
        answers: NDArray[np.float32] = session.run(None, {"input": _LARGE_INPUTS})[0]
        return answers

    np.testing.assert_allclose(run(half), run(model), atol=engine_module.VARIANT_TOLERANCE)


def test_a_weight_that_float16_cannot_hold_makes_no_half_precision() -> None:
    assert half_precision(_large(scale=1e6)) is None


def test_the_publisher_says_what_it_measured_of_each_form() -> None:
    model = _large()
    variants = make_variants(model, num_parameters=5000)

    found = measure_variants(model, variants, _LARGE_INPUTS)

    assert [one["name"] for one in found] == ["model.onnx", *variants]
    assert found[0]["off"] == 0.0
    assert all(one["bytes"] > 0 and one["milliseconds"] > 0 for one in found)
    assert measure_variants(model, {}, _LARGE_INPUTS) == []


def test_the_card_of_a_large_model_names_its_forms_and_the_adapter_measures_them(
    tmp_path: Path,
) -> None:
    study = parse_study(
        """
        [study]
        name = "heart"
        task = "heart-disease"
        rounds = 1
        [model]
        name = "mlp"
        args = { hidden = 256 }
        [training]
        local_steps = 1
        sample_rate = 0.5
        learning_rate = 1.0
        [privacy]
        mode = "none"
        acknowledge = "no privacy"
        """
    )
    task = get_task("heart-disease")
    parameters = to_vector(task.model("mlp", **study.model.args))

    folder = publish(
        registry=tmp_path,
        study=study,
        task=task,
        parameters=parameters,
        fitted=None,
        privacy={"mode": "none", "simulated": False},
        metrics={},
        training={"sites": {}},
        identity=_IDENTITY,
    )

    forms = ["model.onnx", "variants/fp16.onnx", "variants/int8.onnx"]
    card = json.loads((folder / "card.json").read_text())
    assert sorted(one["name"] for one in card["forms"]["measured"]) == forms
    assert "int8" in (folder / "card.html").read_text()
    engine = start_engine(read_release(folder, _IDENTITY.public))
    assert sorted(one.name for one in engine.measured) == forms
    assert sum(one.chosen for one in engine.measured) == 1
