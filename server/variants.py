"""Smaller forms of a model for modest hardware: `variants/` of a release.

They are offered, never assumed to be faster: each host measures before it serves one, and what is
measured here goes into the card. All keep float32 inputs and outputs, so that a host can take one
in place of the other.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Matrix products with fewer weights than this gain nothing: calling them costs more.
_LEAST_WEIGHTS = 4096
# What is multiplied in half precision: preparation stays in single, for a count of platelets is
# more than float16 can hold.
_PRODUCTS = ("MatMul", "Gemm", "Conv")
_LARGEST_FLOAT16 = 65504.0
_REPEATS = 5


def make_variants(model: bytes, *, num_parameters: int) -> dict[str, bytes]:
    """Variants of an ONNX model by path inside a release; none for a small model.

    Args:
        model: The ONNX model.
        num_parameters: How many weights it has.

    Returns:
        `variants/int8.onnx`: weights as 8-bit integers, scaled at run time; `variants/fp16.onnx`:
        weights and products in half precision, if every weight fits.
    """
    if num_parameters < _LEAST_WEIGHTS:
        return {}
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="fedward-variant-") as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        # It infers no types behind a node of the domain ai.onnx.ml, where all are float32.
        plain = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, extra_options=plain)
        found = {"variants/int8.onnx": target.read_bytes()}
    half = half_precision(model)
    return found if half is None else {**found, "variants/fp16.onnx": half}


def half_precision(model: bytes) -> bytes | None:
    """The model with its products in float16 between casts; None if a weight does not fit."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    weights = {one.name: one for one in graph.initializer}
    products = [node for node in graph.node if node.op_type in _PRODUCTS]
    shared = {name for node in graph.node if node not in products for name in node.input}
    nodes, halved = [], set()
    for number, node in enumerate(graph.node):
        if node.op_type not in _PRODUCTS:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if not name:
                continue  # an optional input that is not there
            if name in weights and name not in shared:
                halved.add(name)
                continue
            node.input[place] = f"half_{number}_{place}"
            nodes.append(
                helper.make_node("Cast", [name], [node.input[place]], to=TensorProto.FLOAT16)
            )
        output = node.output[0]
        node.output[0] = f"half_{number}"
        nodes.append(node)
        nodes.append(helper.make_node("Cast", [f"half_{number}"], [output], to=TensorProto.FLOAT))
    for name in halved:
        values = numpy_helper.to_array(weights[name])
        if values.dtype != np.float32 or np.abs(values).max(initial=0.0) > _LARGEST_FLOAT16:
            return None
        weights[name].CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(loaded)
    return bytes(loaded.SerializeToString())


def measure_variants(
    model: bytes, variants: Mapping[str, bytes], inputs: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """What the publisher's host finds of the model and its variants.

    Args:
        model: The ONNX model.
        variants: By path inside a release.
        inputs: The golden inputs, shape `(rows, fields)`.

    Returns:
        For each form, the model first: `name`, `bytes`, `milliseconds` for one patient (median),
        and `off`, the largest difference of a probability from the model's. Empty without variants.
    """
    if not variants:
        return []
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    found: list[dict[str, Any]] = []
    reference: NDArray[np.float32] | None = None
    for name, form in {"model.onnx": model, **variants}.items():
        session = onnxruntime.InferenceSession(form, options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0].name
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for row in inputs:
                session.run(None, {given: row[None]})
            times.append((time.perf_counter() - start) / len(inputs))
        outputs = session.run(None, {given: inputs})[0]
        reference = outputs if reference is None else reference
        found.append(
            {
                "name": name,
                "bytes": len(form),
                "milliseconds": round(1e3 * statistics.median(times), 4),
                "off": float(np.abs(outputs - reference).max()),
            }
        )
    return found
