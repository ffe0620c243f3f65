"""A smaller form of a model is served only where it is faster and says the same."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from release_samples import MODEL, release_files, sigmoid_of, valid_inputs

from fedward.core.errors import ReleaseRejected
from fedward.core.identity import Identity
from fedward.core.release import Release, read_release
from fedward.server.registry import Registry
from fedward.server.variants import make_variants
from fedward.serving import engine as engine_module
from fedward.serving.engine import start_engine

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


def test_a_small_model_has_no_variants_and_a_large_one_is_quantised() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) / 20 for shape in ((4, 500), (500, 1))]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["input", "a"], ["h"]),
            helper.make_node("MatMul", ["h", "b"], ["s"]),
            helper.make_node("Sigmoid", ["s"], ["probability"]),
        ],
        "large",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, "ab", strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    assert make_variants(model.SerializeToString(), num_parameters=100) == {}
    variants = make_variants(model.SerializeToString(), num_parameters=5000)

    kinds = {
        node.op_type for node in onnx.load_from_string(variants["variants/int8.onnx"]).graph.node
    }
    assert "MatMulInteger" in kinds
