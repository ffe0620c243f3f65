import random

import numpy as np
import pytest

from fedward.core.errors import UpdateRejected
from fedward.privacy.secagg import SiteSession
from fedward.privacy.secagg.fuzzing import Stage, fuzz, stages
from fedward.privacy.secagg.wire import Kind, Reader, bitmap, header


def test_malformed_bytes_are_rejected_and_leave_no_trace() -> None:
    outcome = fuzz(5_000, rng=random.Random(20))

    assert outcome["rejected"] > 4_000


@pytest.mark.parametrize("stage", stages(), ids=lambda stage: stage.name)
def test_every_prefix_of_a_message_and_one_byte_more_are_rejected(
    stage: Stage,
) -> None:
    for cut in [*range(0, len(stage.message), 7), len(stage.message) - 1]:
        with pytest.raises(UpdateRejected):
            stage.receive(stage.subject, stage.message[:cut])
    with pytest.raises(UpdateRejected):
        stage.receive(stage.subject, stage.message + b"\0")


def test_another_version_of_the_format_is_rejected() -> None:
    data = bytearray(header(Kind.KEY, bytes(32), 1))
    data[4] = 2

    with pytest.raises(UpdateRejected, match="format version 1"):
        Reader(data, sender="a").header(Kind.KEY, bytes(32))


def test_sets_of_sites_have_one_form() -> None:
    data = bitmap({0, 8}, 9)

    assert data == b"\x01\x01"
    assert Reader(data, sender="a").bitmap(9) == {0, 8}
    with pytest.raises(UpdateRejected, match="does not exist"):
        Reader(b"\x01\x02", sender="a").bitmap(9)


@pytest.mark.parametrize(
    "vector", [np.zeros(4, np.uint32), np.zeros(5, np.int32), np.zeros((5, 1), np.uint32)]
)
def test_a_vector_of_another_shape_or_type_is_refused_before_anything_is_masked(
    vector: np.ndarray,
) -> None:
    begun = next(stage for stage in stages() if stage.name == "begin")
    begun.receive(begun.subject, begun.message)
    assert isinstance(begun.subject, SiteSession)

    with pytest.raises(ValueError, match="of uint32 and of shape"):
        begun.subject.mask(vector)
