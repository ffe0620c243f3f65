from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedward.core.errors import UpdateRejected
from fedward.transport.payload import Payload, pack, unpack

scalars = st.none() | st.booleans() | st.integers() | st.text()
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(
    record=st.dictionaries(st.text(), json_values),
    array=arrays(np.float32, array_shapes(min_side=0), elements=st.floats(width=32)),
)
def test_what_is_packed_is_unpacked(record: dict[str, Any], array: np.ndarray[Any, Any]) -> None:
    received = unpack(pack(Payload(record, {"array": array})), sender="site")

    assert received.record == record
    assert received.arrays["array"].tobytes() == array.tobytes()
    assert received.arrays["array"].shape == array.shape


def _config(**values: Any) -> RecordDict:
    return RecordDict({"fedward": ConfigRecord(values)})


def _array(**changes: Any) -> RecordDict:
    fields = {"dtype": "float32", "shape": (2,), "stype": "fedward.raw", "data": bytes(8)}
    content = pack(Payload({}))
    content["arrays"] = ArrayRecord({"x": Array(**(fields | changes))})
    return content


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        _config(format=2, json="{}"),
        _config(format=1),
        _config(format=1, json="[]"),
        _config(format=1, json="{"),
        _config(format=1, json="[" * 100_000),
        RecordDict({"other": ConfigRecord({})}),
        _array(data=bytes(7)),
        _array(shape=(2**40, 2**40)),
        _array(shape=(-1, -2)),
        _array(dtype="object"),
        _array(stype="numpy.ndarray"),
    ],
)
def test_what_the_reader_does_not_know_is_rejected(content: RecordDict) -> None:
    with pytest.raises(UpdateRejected, match="site"):
        unpack(content, sender="site")


def test_a_received_array_cannot_be_written_to() -> None:
    received = unpack(pack(Payload({}, {"x": np.zeros(3, np.float32)})), sender="site")

    with pytest.raises(ValueError, match="read-only"):
        received.arrays["x"][0] = 1
