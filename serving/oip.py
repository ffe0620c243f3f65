"""The Open Inference Protocol v2 over REST, with the binary tensor extension. Bytes in, bytes out.

github.com/kserve/open-inference-protocol; the extension is Triton's, which its clients use unless
told not to.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward import __version__
from fedward.core.fields import INPUT, OUTPUT, ModelSignature
from fedward.serving.clinical import parse_json
from fedward.serving.problems import Problem

SERVER_NAME = "fedward"
EXTENSIONS = ("binary_tensor_data", "model_repository")
PLATFORM = "onnx_onnxv1"
_ONE_PATIENT = {"name", "datatype", "shape", "data"}
_PLAIN = {float, int, type(None)}
_DTYPES: Mapping[str, type[np.number[Any]]] = {
    "FP64": np.float64,
    "FP32": np.float32,
    "FP16": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT16": np.int16,
    "INT8": np.int8,
    "UINT64": np.uint64,
    "UINT32": np.uint32,
    "UINT16": np.uint16,
    "UINT8": np.uint8,
}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed inference request.

    Attributes:
        inputs: float32, of the shape that the request states; not yet guarded.
        id: The request's id, sent back; None if it has none.
        binary: Whether the answer's numbers follow the JSON as bytes.
    """

    inputs: NDArray[np.float32]
    id: str | None
    binary: bool


def server_metadata() -> dict[str, Any]:
    """What `GET /v2` answers."""
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(signature: ModelSignature, versions: list[str]) -> dict[str, Any]:
    """What `GET /v2/models/NAME` answers; `parameters` are ours."""
    described = signature.to_json()
    return {
        "name": signature.model,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": described["inputs"],
        "outputs": [
            {key: output[key] for key in ("name", "datatype", "shape")}
            for output in described["outputs"]
        ],
    }


def parse_infer(body: bytes, json_length: bytes | None) -> InferRequest:
    """Read an inference request.

    Args:
        body: The request's body, decompressed.
        json_length: The header `Inference-Header-Content-Length`; None without binary tensors.

    Raises:
        Problem: 400, saying which part is wrong.
    """
    tail = b""
    if json_length is not None:
        if not json_length.isdigit() or len(json_length) > 9 or int(json_length) > len(body):  # noqa: PLR2004 (digits of any length that fits)
            raise Problem(400, "Inference-Header-Content-Length does not fit the body")
        body, tail = body[: int(json_length)], body[int(json_length) :]
    request = parse_json(body)
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Problem(400, f"`inputs` must be a list of one tensor, {INPUT!r}")
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise Problem(400, "`id` must be a text")
    return InferRequest(_tensor(inputs[0], tail), identity, _wants_binary(request))


def parse_row(body: bytes) -> list[float | None] | None:
    """The values in the request that nearly every client sends; None for any other request.

    One row of numbers and nulls, and nothing else said: for it each call of NumPy, and each look
    for what might have been asked, costs more than the model.

    Raises:
        Problem: 400, if it is not even JSON.
    """
    request = parse_json(body)
    inputs = request.get("inputs")
    if len(request) != 1 or type(inputs) is not list or len(inputs) != 1:
        return None
    tensor = inputs[0]
    if type(tensor) is not dict or tensor.keys() != _ONE_PATIENT:
        return None
    data, shape = tensor["data"], tensor["shape"]
    if (
        tensor["name"] != INPUT
        or tensor["datatype"] != "FP32"
        or type(data) is not list
        or shape != [1, len(data)]
        or set(map(type, shape)) != {int}
        or not set(map(type, data)) <= _PLAIN
    ):
        return None
    return data


def encode_row(signature: ModelSignature, outputs: list[float]) -> bytes:
    """The answer to `parse_row`'s request; every output must be finite."""
    start = _start(signature.model, signature.version, (1, len(outputs)))
    return f"{start}{outputs}}}]}}".encode()


def encode_infer(
    signature: ModelSignature, request: InferRequest, outputs: NDArray[np.float32]
) -> tuple[bytes, int | None]:
    """An inference's answer.

    Returns:
        The body, and the length of its JSON part if numbers follow it as bytes.
    """
    data = outputs.ravel().tolist()
    if not request.binary and request.id is None and all(map(math.isfinite, data)):
        # Written out: this is most of the traffic, and JSON's encoder costs as much as the model.
        return (
            f"{_start(signature.model, signature.version, outputs.shape)}{data}}}]}}".encode(),
            None,
        )
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(outputs.shape)}
    response: dict[str, Any] = {
        "model_name": signature.model,
        "model_version": str(signature.version),
        "outputs": [output],
    }
    if request.id is not None:
        response["id"] = request.id
    if request.binary:
        raw = np.ascontiguousarray(outputs, "<f4").tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        head = json.dumps(response).encode()
        return head + raw, len(head)
    output["data"] = data
    return json.dumps(response).encode(), None


@lru_cache(maxsize=64)
def _start(model: str, version: int, shape: tuple[int, ...]) -> str:
    """An answer up to its numbers."""
    output = {"name": OUTPUT, "datatype": "FP32", "shape": list(shape), "data": []}
    answer = {"model_name": model, "model_version": str(version), "outputs": [output]}
    return json.dumps(answer, separators=(",", ":")).removesuffix("[]}]}")


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers as the model takes them; what float32 cannot hold becomes infinite."""
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def dtype_of(name: object) -> type[np.number[Any]]:
    """The NumPy type of a protocol's datatype. Raises `Problem` 400."""
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise Problem(400, f"datatype must be one of {', '.join(_DTYPES)}")
    return dtype


def shaped(values: NDArray[Any], shape: object) -> NDArray[np.float32]:
    """`values` in the shape that a request states. Raises `Problem` 400."""
    if (
        not isinstance(shape, (list, tuple))
        or not 1 <= len(shape) <= 4  # noqa: PLR2004 (images have four dimensions)
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    ):
        raise Problem(400, f"{INPUT!r}: `shape` must be a list of whole numbers")
    count = 1
    for n in shape:
        count *= n
    if count != values.size:
        raise Problem(400, f"{INPUT!r}: `shape` asks for {count} numbers and {values.size} came")
    return to_float32(values.reshape(shape))


def _tensor(tensor: dict[str, Any], tail: bytes) -> NDArray[np.float32]:
    if tensor.get("name") != INPUT:
        raise Problem(400, f"unexpected input; the only one is {INPUT!r}")
    dtype = dtype_of(tensor.get("datatype"))
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        return shaped(numbers(tensor.get("data")), tensor.get("shape"))
    if not isinstance(size, int) or size != len(tail) or size % np.dtype(dtype).itemsize:
        raise Problem(400, f"{INPUT!r}: `binary_data_size` does not fit the body")
    return shaped(np.frombuffer(tail, np.dtype(dtype).newbyteorder("<")), tensor.get("shape"))


def numbers(data: object) -> NDArray[np.float64]:
    """A list of numbers, nested or not, null being NaN. Raises `Problem` 400."""
    if not isinstance(data, list):
        raise Problem(400, f"{INPUT!r}: `data` must be a list of numbers")
    try:
        values = np.array(data)
        if values.dtype == object:
            # null is missing; anything else that is no number is refused just below.
            plain = [_number(value) for value in values.ravel()]
            values = np.array(plain, np.float64).reshape(values.shape)
    except (ValueError, OverflowError, RecursionError):
        raise Problem(400, f"{INPUT!r}: `data` is not a regular array of numbers") from None
    if values.dtype.kind not in "iuf" and values.size:
        raise Problem(400, f"{INPUT!r}: `data` must hold numbers, or null for missing")
    return values.astype(np.float64, copy=False)


def _number(value: object) -> float:
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Problem(400, f"{INPUT!r}: `data` must hold numbers, or null for missing")
    return float(value)


def _wants_binary(request: dict[str, Any]) -> bool:
    binary = _parameters(request).get("binary_data_output", False)
    outputs = request.get("outputs")
    if outputs is None:
        return binary is True
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        raise Problem(400, "`outputs` must be a list of objects")
    for output in outputs:
        if output.get("name") != OUTPUT:
            raise Problem(400, f"unexpected output; the only one is {OUTPUT!r}")
        binary = _parameters(output).get("binary_data", binary)
    return binary is True


def _parameters(part: dict[str, Any]) -> dict[str, Any]:
    parameters = part.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Problem(400, "`parameters` must be an object")
    return parameters
