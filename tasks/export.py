"""ONNX of a whole prediction, written node by node: preparation, layers, probability.

Written with `onnx.helper` from the preparation that trained the model, so that no clinic has to
repeat it in its own code, and none can repeat it wrongly.
"""

from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fedward.tasks.preparation import Preparation

if TYPE_CHECKING:
    from torch import Tensor, nn

# Old enough for any ONNX Runtime of the last years; opset 17 goes with IR 8.
_OPSET = 17
_IR_VERSION = 8


class _Graph:
    """Nodes and constants as they are written down."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[np.float32] | NDArray[np.int64]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(
        self, operation: str, *inputs: str, output: str | None = None, **attributes: int
    ) -> str:
        name = output or f"{operation.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name


def export_binary(model: "nn.Module", preparation: Preparation, *, name: str) -> bytes:
    """A model of log-odds and its preparation, as `Task.export_onnx` describes.

    Args:
        model: An `nn.Sequential` of `Linear` and `ReLU` with one output.
        preparation: Of the features that it was trained on.
        name: The graph's name.

    Raises:
        ValueError: The model has another kind of layer, or takes other features.
    """
    graph = _Graph()
    features = _prepare(graph, preparation)
    log_odds = _layers(graph, model, features, num_features=preparation.num_features)
    graph.add("Sigmoid", log_odds, output="probability")
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            name,
            [
                helper.make_tensor_value_info(
                    "input", TensorProto.FLOAT, ["N", preparation.num_columns]
                )
            ],
            [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["N", 1])],
            initializer=graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        producer_name="fedward",
    )
    proto.ir_version = _IR_VERSION
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def _prepare(graph: _Graph, preparation: Preparation) -> str:
    """The same four groups of features as `Preparation.apply`, in the same order."""
    absent = graph.add("IsNaN", "input")
    zero = graph.constant(np.zeros(1, dtype=np.float32))
    known = graph.add("Not", absent)
    present = graph.add("Cast", known, to=TensorProto.FLOAT)
    filled = graph.add("Where", absent, zero, "input")

    def columns(tensor: str, indices: list[int]) -> str:
        return graph.add(
            "Gather", tensor, graph.constant(np.array(indices, dtype=np.int64)), axis=1
        )

    def constants(values: list[float]) -> str:
        return graph.constant(np.array(values, dtype=np.float32))

    groups: list[str] = []
    if scaled := preparation.scaled:
        indices = [s.column for s in scaled]
        cut = graph.add("Max", columns(filled, indices), constants([s.low for s in scaled]))
        cut = graph.add("Min", cut, constants([s.high for s in scaled]))
        centered = graph.add("Sub", cut, constants([s.center for s in scaled]))
        mapped = graph.add("Mul", centered, constants([s.scale for s in scaled]))
        groups.append(graph.add("Mul", mapped, columns(present, indices)))
    if signed := list(preparation.signed):
        doubled = graph.add("Mul", columns(filled, signed), constants([2.0]))
        mapped = graph.add("Sub", doubled, constants([1.0]))
        groups.append(graph.add("Mul", mapped, columns(present, signed)))
    if missing := list(preparation.missing):
        groups.append(graph.add("Cast", columns(absent, missing), to=TensorProto.FLOAT))
    if equals := preparation.equals:
        # The raw input, not the filled one: NaN equals no code, and 0 is a code.
        same = graph.add(
            "Equal", columns("input", [c for c, _ in equals]), constants([v for _, v in equals])
        )
        groups.append(graph.add("Cast", same, to=TensorProto.FLOAT))
    together = graph.add("Concat", *groups, axis=1)
    return graph.add("Mul", together, constants([preparation.gain]))


def _layers(graph: _Graph, model: "nn.Module", features: str, *, num_features: int) -> str:
    from torch import nn

    width, current = num_features, features
    # Anything but a Sequential is one layer, and named in the error below.
    for layer in model if isinstance(model, nn.Sequential) else (model,):
        match layer:
            case nn.ReLU():
                current = graph.add("Relu", current)
            case nn.Linear():
                if layer.in_features != width:
                    raise ValueError(f"a layer takes {layer.in_features} features, not {width}")
                inputs = [current, graph.constant(_array(layer.weight))]
                if layer.bias is not None:
                    inputs.append(graph.constant(_array(layer.bias)))
                current = graph.add("Gemm", *inputs, transB=1)
                width = layer.out_features
            case _:
                kind = type(layer).__name__
                raise ValueError(
                    f"cannot export a {kind}; a Sequential of Linear and ReLU is needed"
                )
    if width != 1:
        raise ValueError(f"a binary model has one output, this one has {width}")
    return current


def _array(tensor: "Tensor") -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy().astype(np.float32)
