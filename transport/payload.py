"""A payload: arrays and one JSON record with a format version, as a Flower `RecordDict`.

A reader refuses what it does not know, and nothing is ever unpickled: an array is its type, its
shape and its bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedward.core.errors import UpdateRejected

FORMAT = 1
_RECORD, _ARRAYS, _STYPE = "fedward", "arrays", "fedward.raw"
_DTYPES = {"float32", "float64", "int64", "uint32", "uint8"}
_IN_MEMORY = frozenset(np.dtype(name) for name in _DTYPES)
_MOST_JSON = 16 * 1024 * 1024
_MOST_BYTES = 2 * 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Payload:
    """What one message carries.

    Attributes:
        record: A JSON object.
        arrays: Arrays by name; those that were received are read-only.
    """

    record: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def pack(payload: Payload) -> RecordDict:
    """Write a payload as Flower records."""
    content = RecordDict(
        {
            _RECORD: ConfigRecord(
                {"format": FORMAT, "json": json.dumps(payload.record, allow_nan=False)}
            )
        }
    )
    if payload.arrays:
        content[_ARRAYS] = ArrayRecord(
            {name: _to_flower(array) for name, array in payload.arrays.items()}
        )
    return content


class InMemory(RecordDict):
    """A payload that stays in this process, as Flower's content without its records.

    Nothing can be received as one: a message that crosses a border arrives as plain records.

    Args:
        payload: What it carries; its record goes through JSON, as on the wire.
    """

    def __init__(self, payload: Payload) -> None:
        super().__init__()
        record = json.loads(json.dumps(payload.record, allow_nan=False))
        self.payload = Payload(record, {n: _read_only(a) for n, a in payload.arrays.items()})


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype not in _IN_MEMORY:
        raise ValueError(f"arrays of {array.dtype} do not travel")
    view = array.view()
    view.flags.writeable = False
    return view


def unpack(content: RecordDict, *, sender: str) -> Payload:
    """Read a payload, strictly.

    Raises:
        UpdateRejected: The content is not a payload of this format; names `sender`.
    """
    if isinstance(content, InMemory):
        return content.payload
    if set(content) - {_RECORD, _ARRAYS}:
        raise UpdateRejected(site=sender, reason="unknown records; both ends need one version")
    head = content.get(_RECORD)
    if not isinstance(head, ConfigRecord) or head.get("format") != FORMAT:
        raise UpdateRejected(
            site=sender, reason=f"not of wire format {FORMAT}; install the same Fedward there"
        )
    text = head.get("json")
    if not isinstance(text, str) or len(text) > _MOST_JSON:
        raise UpdateRejected(site=sender, reason="its record is missing or too long")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UpdateRejected(site=sender, reason="its record is not JSON") from error
    if not isinstance(record, dict):
        raise UpdateRejected(site=sender, reason="its record is not a JSON object")
    arrays = content.get(_ARRAYS, ArrayRecord())
    if not isinstance(arrays, ArrayRecord):
        raise UpdateRejected(site=sender, reason="its arrays are no arrays")
    return Payload(record, {name: _from_flower(a, name, sender) for name, a in arrays.items()})


def _to_flower(array: NDArray[Any]) -> Array:
    if str(array.dtype) not in _DTYPES:
        raise ValueError(f"arrays of {array.dtype} do not travel")
    contiguous = np.ascontiguousarray(array)
    return Array(dtype=str(array.dtype), shape=array.shape, stype=_STYPE, data=contiguous.tobytes())


def _from_flower(array: Array, name: str, sender: str) -> NDArray[Any]:
    shape = tuple(array.shape)
    known = array.stype == _STYPE and array.dtype in _DTYPES and all(n >= 0 for n in shape)
    size = prod(shape) * np.dtype(array.dtype).itemsize if known else -1
    if size < 0 or size > _MOST_BYTES or len(array.data) != size:
        raise UpdateRejected(site=sender, reason=f"array {name} is malformed")
    return np.frombuffer(array.data, dtype=array.dtype).reshape(shape)
