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
_ML, _ML_OPSET = "ai.onnx.ml", 3  # of ONNX, too: classical preparation


class _Graph:
    """Nodes and constants as they are written down."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[np.float32] | NDArray[np.int64]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def add(
        self,
        operation: str,
        *inputs: str,
        output: str | None = None,
        domain: str = "",
        **attributes: int | list[float],
    ) -> str:
        name = output or f"{operation.lower()}_{len(self.nodes)}"
        node = helper.make_node(operation, list(inputs), [name], domain=domain, **attributes)
        self.nodes.append(node)
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
    log_odds = _layers(graph, model, *_prepare(graph, preparation))
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
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_ML, _ML_OPSET)],
        producer_name="fedward",
    )
    proto.ir_version = _IR_VERSION
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def _prepare(graph: _Graph, preparation: Preparation) -> tuple[str, NDArray[np.float64]]:
    """What the features are linear in, and how: `columns @ matrix` are `Preparation.apply`'s.

    A runtime spends more on a node than on a row of numbers, so that every raw column goes
    through the same few nodes, needed or not, and sorting them out is left to the first layer.

    Returns:
        The columns' name, and the matrix of shape `(columns, num_features)`.
    """
    width = preparation.num_columns
    low, high = np.full(width, -1.0), np.full(width, 1.0)
    center, scale = np.zeros(width), np.ones(width)
    for s in preparation.scaled:
        center[s.column], scale[s.column] = s.center, s.scale
        low[s.column], high[s.column] = (s.low - s.center) * s.scale, (s.high - s.center) * s.scale
    for column in preparation.signed:  # its codes 0 and 1 are inside any range
        center[column], scale[column] = 0.5, 2.0
    absent = graph.add("IsNaN", "input")
    mapped = graph.add("Scaler", "input", domain=_ML, offset=center.tolist(), scale=scale.tolist())
    # 0 is the middle of the range.
    known = graph.add("Where", absent, graph.constant(np.zeros(1, np.float32)), mapped)
    groups = [_cut(graph, known, low, high)]
    sources = [*(s.column for s in preparation.scaled), *preparation.signed]
    if preparation.missing:
        groups.append(graph.add("Cast", absent, to=TensorProto.FLOAT))
        sources += [width + column for column in preparation.missing]
    if equals := preparation.equals:
        # The raw input, in which NaN equals no code.
        columns = graph.constant(np.array([column for column, _ in equals], np.int64))
        codes = graph.constant(np.array([code for _, code in equals], np.float32))
        same = graph.add("Equal", graph.add("Gather", "input", columns, axis=1), codes)
        first = len(groups) * width
        groups.append(graph.add("Cast", same, to=TensorProto.FLOAT))
        sources += range(first, first + len(equals))
    together = graph.add("Concat", *groups, axis=1) if len(groups) > 1 else groups[0]
    count = width * (1 + bool(preparation.missing)) + len(preparation.equals)
    matrix = np.zeros((count, preparation.num_features))
    matrix[sources, np.arange(preparation.num_features)] = preparation.gain
    return together, matrix


def _cut(graph: _Graph, values: str, low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """Each column cut to its range: one node where all ranges are the same, as public ones are."""
    ends = np.stack([low, high]).round(6)
    if (ends == ends[:, :1]).all():
        bounds = [graph.constant(_single(end)) for end in ends[:, 0]]
        return graph.add("Clip", values, *bounds)
    raised = graph.add("Max", values, graph.constant(_single(low)))
    return graph.add("Min", raised, graph.constant(_single(high)))


def _layers(graph: _Graph, model: "nn.Module", columns: str, matrix: NDArray[np.float64]) -> str:
    from torch import nn

    width, current = matrix.shape[1], columns
    first: NDArray[np.float64] | None = matrix
    # Anything but a Sequential is one layer, and named in the error below.
    for layer in model if isinstance(model, nn.Sequential) else (model,):
        match layer:
            case nn.ReLU():
                if first is not None:
                    current = graph.add("MatMul", current, graph.constant(_single(first)))
                    first = None
                current = graph.add("Relu", current)
            case nn.Linear():
                if layer.in_features != width:
                    raise ValueError(f"a layer takes {layer.in_features} features, not {width}")
                weight = _array(layer.weight)
                if first is not None:
                    weight, first = _single(weight @ first.T), None
                inputs = [current, graph.constant(weight)]
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


def _single(values: NDArray[np.float64] | np.float64) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def _array(tensor: "Tensor") -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy().astype(np.float32)
