"""ONNX of a whole prediction, written node by node: preparation, layers, probability.

Written with `onnx.helper` from the preparation that trained the model, so that no clinic has to
repeat it in its own code, and none can repeat it wrongly.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
_TREE_NODES = (
    *(f"nodes_{name}" for name in ("treeids", "nodeids", "featureids", "modes", "values")),
    *(f"nodes_{name}" for name in ("truenodeids", "falsenodeids")),
)
_TREE_LEAVES = ("target_treeids", "target_nodeids", "target_ids", "target_weights")


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
        **attributes: Any,
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
    log_odds = _layers(graph, model, preparation)
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


@dataclass(frozen=True, slots=True)
class _Linear:
    """A layer whose input is the features, as `bias + weight @ features`.

    Attributes:
        weight: Shape `(outputs, num_features)`.
        bias: Shape `(outputs,)`.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def _first_layer(graph: _Graph, preparation: Preparation, layer: _Linear) -> str:
    """The preparation and the first layer together; gives the layer's outputs.

    A runtime spends more on a node than on a row of numbers. Every raw column goes through the
    same few nodes, and which of them a feature is of is left to the layer's weights. What depends
    on a column being missing or being a code adds a constant to the layer's outputs: a tree for
    each such column, all of them one node, whose sum is the layer's bias.
    """
    width = preparation.num_columns
    low, high = np.full(width, -1.0), np.full(width, 1.0)
    center, scale = np.zeros(width), np.ones(width)
    for s in preparation.scaled:
        center[s.column], scale[s.column] = s.center, s.scale
        low[s.column], high[s.column] = (s.low - s.center) * s.scale, (s.high - s.center) * s.scale
    for column in preparation.signed:  # its codes 0 and 1 are inside any range
        center[column], scale[column] = 0.5, 2.0
    # The center of a range becomes 0.
    known = graph.add(
        "Imputer",
        "input",
        domain=_ML,
        imputed_value_floats=center.tolist(),
        replaced_value_float=float("nan"),
    )
    mapped = graph.add("Scaler", known, domain=_ML, offset=center.tolist(), scale=scale.tolist())
    weight = layer.weight * preparation.gain
    sources = [*(s.column for s in preparation.scaled), *preparation.signed]
    of_columns = np.zeros((len(weight), width))
    of_columns[:, sources] = weight[:, : len(sources)]
    bias = _trees(graph, preparation, weight[:, len(sources) :], layer.bias)
    inputs = [_cut(graph, mapped, low, high), graph.constant(_single(of_columns)), bias]
    return graph.add("Gemm", *inputs, transB=1)


def _trees(
    graph: _Graph,
    preparation: Preparation,
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
) -> str:
    """`bias`, and of `weight` the columns of the indicators that a row has: missing ones, equals.

    A column's tree is a chain of one kind of test, "at most": just below the first code? the
    first code? just below the second? ... infinity? What is at most nothing is missing. (Not
    `BRANCH_EQ`: ONNX Runtime 1.31 takes neighbouring ones of several targets for one.)
    """
    nothing = np.zeros(len(bias))
    split = len(preparation.missing)
    missing = dict(zip(preparation.missing, weight.T[:split], strict=True))
    codes: dict[int, list[tuple[float, NDArray[np.float64]]]] = {}
    for (column, code), added in zip(preparation.equals, weight.T[split:], strict=True):
        codes.setdefault(column, []).append((code, added))
    nodes: list[tuple[int, int, int, str, float, int, int]] = []
    leaves: list[tuple[int, int, int, float]] = []

    def leaf(tree: int, here: int, added: NDArray[np.float64]) -> None:
        nodes.append((tree, here, 0, "LEAF", 0.0, 0, 0))
        # A leaf that adds nothing still has to add to something.
        values = [(i, float(value)) for i, value in enumerate(added) if value] or [(0, 0.0)]
        leaves.extend((tree, here, *value) for value in values)

    for tree, column in enumerate(sorted({*missing, *codes})):
        steps: list[tuple[float, NDArray[np.float64]]] = []
        for code, added in sorted(codes.get(column, []), key=lambda case: case[0]):
            steps += [(_just_below(code), nothing), (code, added)]
        steps.append((np.inf, nothing))
        for place, (most, added) in enumerate(steps):
            here = 2 * place
            nodes.append((tree, here, column, "BRANCH_LEQ", most, here + 1, here + 2))
            leaf(tree, here + 1, added)
        leaf(tree, 2 * len(steps), missing.get(column, nothing))
    if not nodes:
        return graph.constant(_single(bias))
    named: dict[str, Any] = dict(zip(_TREE_NODES, map(list, zip(*nodes, strict=True)), strict=True))
    named |= dict(zip(_TREE_LEAVES, map(list, zip(*leaves, strict=True)), strict=True))
    return graph.add(
        "TreeEnsembleRegressor",
        "input",
        domain=_ML,
        n_targets=len(bias),
        base_values=bias.tolist(),
        **named,
    )


def _just_below(code: float) -> float:
    """The next smaller float32; for 0 the next that is not subnormal, which may count as 0."""
    if code == 0:
        return -float(np.finfo(np.float32).tiny)
    return float(np.nextafter(np.float32(code), np.float32(-np.inf)))


def _cut(graph: _Graph, values: str, low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """Each column cut to its range: one node where all ranges are the same, as public ones are."""
    ends = np.stack([low, high]).round(6)
    if (ends == ends[:, :1]).all():
        bounds = [graph.constant(_single(end)) for end in ends[:, 0]]
        return graph.add("Clip", values, *bounds)
    raised = graph.add("Max", values, graph.constant(_single(low)))
    return graph.add("Min", raised, graph.constant(_single(high)))


def _layers(graph: _Graph, model: "nn.Module", preparation: Preparation) -> str:
    from torch import nn

    width, current = preparation.num_features, ""
    # Anything but a Sequential is one layer, and named in the error below.
    for layer in model if isinstance(model, nn.Sequential) else (model,):
        match layer:
            case nn.ReLU():
                if not current:  # the features themselves
                    same = _Linear(np.eye(width), np.zeros(width))
                    current = _first_layer(graph, preparation, same)
                current = graph.add("Relu", current)
            case nn.Linear():
                if layer.in_features != width:
                    raise ValueError(f"a layer takes {layer.in_features} features, not {width}")
                width = layer.out_features
                weight = _array(layer.weight)
                given: Tensor | None = layer.bias
                bias = np.zeros(width, np.float32) if given is None else _array(given)
                if not current:
                    first = _Linear(weight.astype(np.float64), bias.astype(np.float64))
                    current = _first_layer(graph, preparation, first)
                else:
                    constants = [graph.constant(weight), graph.constant(bias)]
                    current = graph.add("Gemm", current, *constants, transB=1)
            case _:
                kind = type(layer).__name__
                raise ValueError(
                    f"no ONNX form of {kind} is known here, only of a Sequential of Linear and ReLU"
                )
    if width != 1:
        raise ValueError(f"a binary model has one output, this one has {width}")
    return current


def _single(values: NDArray[np.float64] | np.float64) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def _array(tensor: "Tensor") -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy().astype(np.float32)
