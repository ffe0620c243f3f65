"""A small release for tests: a logistic model of four fields, made without torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from fedward.core.arrays import write_golden
from fedward.core.fields import Field, ModelSignature
from fedward.core.identity import Identity
from fedward.server.card import card_json
from fedward.server.card_html import card_html
from fedward.server.registry import Registry
from fedward.server.statement import privacy_statement

MODEL = "tiny"
SIGNATURE = ModelSignature(
    model=MODEL,
    version=1,
    task="tiny",
    outcome="a narrowed coronary artery",
    fields=(
        Field(
            name="age",
            title="age in years",
            kind="number",
            unit="a",
            low=18,
            high=120,
            codes={},
            units={},
            required=True,
        ),
        Field(
            name="sex",
            title="administrative sex",
            kind="category",
            codes={"female": 0, "male": 1},
            units={},
        ),
        Field(
            name="cholesterol",
            title="total cholesterol",
            kind="number",
            unit="mg/dl",
            low=50,
            high=1000,
            codes={},
            units={"mmol/L": (38.665, 0.0)},
            loinc="2093-3",
        ),
        Field(name="smoker", title="smokes", kind="flag", codes={"no": 0, "yes": 1}, units={}),
    ),
)
PRIVACY = {
    "mode": "local",
    "unit": "patient",
    "delta": 1e-5,
    "neighboring_relation": "add-or-remove-one",
    "accountant": "pld",
    "simulated": False,
    "sites": {"cleveland": {"epsilon": 3.98}, "va": {"epsilon": 3.5}},
}
METRICS = {
    "pooled": {"auroc": 0.89, "accuracy": 0.8, "num_examples": 103},
    "worst": {"site": "va", "auroc": 0.73},
    "sites": {
        "cleveland": {"auroc": 0.9, "accuracy": 0.82, "num_examples": 91},
        "va": {"auroc": 0.73, "accuracy": 0.7, "num_examples": 12},
    },
}
WEIGHTS = np.array([0.02, 0.7, 0.003, 0.5], np.float32)


def sigmoid_of(inputs: NDArray[np.float32], *, bias: float = -2.0) -> NDArray[np.float32]:
    """What the sample model computes, in NumPy: the oracle."""
    score = np.nan_to_num(inputs.astype(np.float64), nan=0.0) @ WEIGHTS.astype(np.float64) + bias
    return (1 / (1 + np.exp(-score))).astype(np.float32).reshape(-1, 1)


def onnx_model(*, bias: float = -2.0) -> bytes:
    """NaN becomes 0, then a logistic model."""
    constants = [
        numpy_helper.from_array(WEIGHTS.reshape(4, 1), "weights"),
        numpy_helper.from_array(np.array([bias], np.float32), "bias"),
        numpy_helper.from_array(np.array([0], np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("IsNaN", ["input"], ["gone"]),
        helper.make_node("Where", ["gone", "zero", "input"], ["filled"]),
        helper.make_node("Gemm", ["filled", "weights", "bias"], ["score"]),
        helper.make_node("Sigmoid", ["score"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        MODEL,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def valid_inputs(rows: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Inputs that the sample's signature allows; some optional values missing."""
    rng = np.random.default_rng(seed)
    inputs = np.stack(
        [
            rng.uniform(18, 120, rows),
            rng.integers(2, size=rows),
            rng.uniform(50, 1000, rows),
            rng.integers(2, size=rows),
        ],
        axis=1,
    ).astype(np.float32)
    inputs[:, 1:][rng.random((rows, 3)) < 0.2] = np.nan
    return inputs


def release_files(
    version: int = 1, *, bias: float = -2.0, model: str = MODEL, golden_bias: float | None = None
) -> dict[str, bytes]:
    """Every file of a release of the sample model."""
    signature = replace(SIGNATURE, version=version, model=model)
    statement = privacy_statement(PRIVACY)
    training = {"study": model, "study_hash": "0" * 64, "rounds": 3, "sites": ["cleveland", "va"]}
    card = card_json(signature, statement=statement, metrics=METRICS, training=training)
    inputs = valid_inputs(16)
    outputs = sigmoid_of(inputs, bias=bias if golden_bias is None else golden_bias)
    return {
        "model.safetensors": save({"weights": WEIGHTS, "bias": np.array([bias], np.float32)}),
        "model.onnx": onnx_model(bias=bias),
        "signature.json": json.dumps(signature.to_json()).encode(),
        "card.json": json.dumps(card).encode(),
        "card.html": card_html(card, signature).encode(),
        "privacy.json": json.dumps(statement).encode(),
        "training.json": json.dumps(training).encode(),
        "golden.npz": write_golden(inputs, outputs),
    }


def publish_sample(
    registry: Path,
    identity: Identity,
    *,
    bias: float = -2.0,
    model: str = MODEL,
    monitor: dict[str, Any] | None = None,
) -> Path:
    """The next version of the sample model in a registry, with a reference or without."""

    def files(version: int) -> dict[str, bytes]:
        made = release_files(version, bias=bias, model=model)
        return made if monitor is None else {**made, "monitor.json": json.dumps(monitor).encode()}

    return Registry(registry).add(model, files, identity=identity)
