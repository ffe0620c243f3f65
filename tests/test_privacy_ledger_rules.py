"""The ledger against a model of it, over random histories."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedward.core.errors import BudgetExceeded
from fedward.core.identity import Identity
from fedward.privacy.accounting import DpEvent, compose, dp_sgd_event, privacy_spent
from fedward.privacy.ledger import Ledger, Reservation

DELTA = 1e-5
LIMIT = 3.0
STUDIES = st.sampled_from(["heart", "lungs", "kidneys"])
STEPS = st.sampled_from([5, 20, 80])
NOISE = {"heart": 3.0, "lungs": 5.0, "kidneys": 3.0}


def event_of(study: str, steps: int) -> DpEvent:
    return dp_sgd_event(noise_multiplier=NOISE[study], sample_rate=0.1, steps=steps)


def epsilon(spent: Counter[str]) -> float:
    event = compose(event_of(study, steps) for study, steps in spent.items())
    return privacy_spent(event, delta=DELTA, unit="patient").epsilon


class Histories(RuleBasedStateMachine):
    """Allot, reserve, settle, close and restart in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.identity = Identity.generate_site()
        self.spent: Counter[str] = Counter()
        self.rest: dict[str, int] = {}
        self.unsettled: list[Reservation] = []
        self.heads: list[str] = []

    @initialize()
    def open(self) -> None:
        self.ledger = Ledger.open(self.path, identity=self.identity, site="va", simulated=False)

    @rule(study=STUDIES, steps=STEPS)
    def allot(self, study: str, steps: int) -> None:
        event = event_of(study, steps)
        total = self.spent + Counter(self.rest) + Counter({study: steps})
        if study in self.rest:
            if epsilon(total) > LIMIT:
                with pytest.raises(BudgetExceeded):
                    self.ledger.extend(study=study, event=event, max_epsilon=LIMIT, delta=DELTA)
                return
            self.ledger.extend(study=study, event=event, max_epsilon=LIMIT, delta=DELTA)
            self.rest[study] += steps
        elif epsilon(total) > LIMIT:
            head = self.ledger.head
            with pytest.raises(BudgetExceeded):
                self._allot(study, event)
            assert self.ledger.head == head
        else:
            self._allot(study, event)
            self.rest[study] = steps

    def _allot(self, study: str, event: DpEvent) -> None:
        self.ledger.allot(study=study, event=event, max_epsilon=LIMIT, delta=DELTA, unit="patient")

    @precondition(lambda self: self.rest)
    @rule(data=st.data(), steps=st.sampled_from([1, 5, 20]))
    def reserve(self, data: st.DataObject, steps: int) -> None:
        study = data.draw(st.sampled_from(sorted(self.rest)))
        if steps > self.rest[study]:
            with pytest.raises(BudgetExceeded):
                self.ledger.reserve(study=study, round_number=1, event=event_of(study, steps))
            return
        self.unsettled.append(
            self.ledger.reserve(study=study, round_number=1, event=event_of(study, steps))
        )
        self.rest[study] -= steps
        self.spent[study] += steps

    @precondition(lambda self: self.unsettled)
    @rule()
    def settle(self) -> None:
        reservation = self.unsettled.pop()
        self.ledger.settle(reservation, update_digest=f"{reservation.seq:064x}")

    @precondition(lambda self: self.rest)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        study = data.draw(st.sampled_from(sorted(self.rest)))
        self.ledger.close(study, delta=DELTA)
        del self.rest[study]

    @rule()
    def restart(self) -> None:
        self.ledger.shut()
        self.open()

    @rule()
    def note_the_head(self) -> None:
        self.heads.append(self.ledger.head)

    @invariant()
    def the_total_is_what_was_reserved_and_within_the_limit(self) -> None:
        if not hasattr(self, "ledger"):
            return
        total = self.ledger.spent(DELTA).epsilon
        assert total == pytest.approx(epsilon(self.spent), abs=1e-6)
        assert total <= LIMIT

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.verify()
            for head in self.heads:
                self.ledger.verify(against_head=head)
            self.ledger.shut()
        self.folder.cleanup()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
