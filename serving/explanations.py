"""Which explanation a request asks for, and making it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import parse_qs

import numpy as np
from numpy.typing import NDArray

from fedward.serving.catalogue import Live
from fedward.serving.explain import explain, explanation_json
from fedward.serving.lime import explain_locally, line_json
from fedward.serving.occlusion import occlude, occlusion_json, parse_grid
from fedward.serving.problems import Problem

Method = Literal["shapley", "lime", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class Asked:
    """An explanation that is asked for.

    Attributes:
        method: How.
        grid: With `occlusion`, the picture's size, `ROWSxCOLUMNS`.
        window: With `occlusion`, the window's.
    """

    method: Method = "shapley"
    grid: str = ""
    window: str = "1x1"


def parse_asked(query: bytes) -> Asked:
    """Read a query such as `method=lime`. Raises `Problem` 422."""
    given = parse_qs(query.decode("latin-1"))
    method = given.get("method", ["shapley"])[-1]
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise Problem(422, f"method must be one of {known}", field="method", allowed=known)
    grid, window = given.get("grid", [""])[-1], given.get("window", ["1x1"])[-1]
    return Asked(method, grid, window)


def explanation_of(live: Live, inputs: NDArray[np.float32], asked: Asked) -> dict[str, Any]:
    """Each value's contribution to one row's answer, as answered.

    Args:
        live: The version that answered.
        inputs: float32, shape `(fields,)`.
        asked: Which explanation.

    Raises:
        Problem: 400 or 422, if this model cannot be explained so.
    """
    signature, predict = live.signature, live.engine.predict
    if len(signature.outputs) != 1:
        raise Problem(400, "only a model of one probability is explained")
    match asked.method:
        case "lime":
            line = explain_locally(predict, inputs, signature, live.histograms)
            return line_json(signature, line)
        case "occlusion":
            grid = parse_grid(asked.grid, asked.window, signature)
            lost = occlude(predict, inputs, live.reference, grid)
            return occlusion_json(signature, lost, grid)
        case "shapley":
            return explanation_json(signature, explain(predict, inputs, live.reference))
