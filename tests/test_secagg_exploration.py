import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from fedward.privacy.secagg import SiteSession
from fedward.privacy.secagg.exploration import Explorer
from fedward.privacy.secagg.messages import UnmaskRequest
from fedward.privacy.secagg.site import Standing


class NoConsistency(SiteSession):
    """Believes any list of survivors, whoever signed it."""

    def _check_signatures(self, current: Standing, asked: UnmaskRequest) -> None: ...


class AnswersAgain(SiteSession):
    """Answers every unmasking request of a round."""

    def _check_survivors(self, current: Standing, number: int, survivors: frozenset[int]) -> None:
        super()._check_survivors(dataclasses.replace(current, unmasked=False), number, survivors)


class MasksAgain(SiteSession):
    """Sends another vector under the same masks."""

    def mask(self, vector: NDArray[np.uint32]) -> memoryview:
        if self._round is not None:
            self._round = dataclasses.replace(self._round, masked=False)
        return super().mask(vector)


class Replays(SiteSession):
    """Opens a round again that it has left."""

    @property
    def round_number(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("count", "dishonest", "rounds", "states"),
    [(3, 0, 1, 120), (3, 1, 1, 28), (3, 0, 2, 2715), (4, 1, 1, 5931)],
)
def test_no_reachable_state_reveals_more_than_the_sum(
    count: int, dishonest: int, rounds: int, states: int
) -> None:
    walk = Explorer(count, dishonest=dishonest, rounds=rounds).walk()

    print(f"{count} sites, {dishonest} dishonest, {rounds} rounds: {walk.states} states, "
          f"{walk.messages} messages")  # fmt: skip
    assert walk.violation is None
    # The walk is deterministic: fewer states would mean that the menu shrank.
    assert walk.states == states


@pytest.mark.parametrize(
    ("session", "count", "dishonest", "rounds", "found"),
    [
        (NoConsistency, 4, 1, 1, "the sum of honest sites"),
        (AnswersAgain, 4, 1, 1, "both secrets"),
        (MasksAgain, 3, 1, 1, "two vectors"),
        (Replays, 4, 1, 1, "two vectors"),
    ],
)
def test_a_planted_mistake_is_found(
    session: type[SiteSession], count: int, dishonest: int, rounds: int, found: str
) -> None:
    walk = Explorer(count, dishonest=dishonest, rounds=rounds, session=session).walk()

    assert walk.violation is not None
    assert walk.violation.startswith(found)
    assert walk.trace


def test_a_threshold_of_half_is_found() -> None:
    walk = Explorer(4, dishonest=1, threshold=2).walk()

    assert walk.violation is not None
    assert "both secrets" in walk.violation or "alone" in walk.violation
