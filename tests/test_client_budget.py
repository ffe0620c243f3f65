"""A round that crashed in the middle is paid for twice, and no other round pays for it."""

from pathlib import Path

import pytest
from studies import write_study

from fedward.client.budget import Budget
from fedward.client.plan import SitePlan
from fedward.core.errors import BudgetExceeded
from fedward.core.identity import Identity
from fedward.core.site import Site
from fedward.core.study import load_study
from fedward.privacy.accounting import calibrate
from fedward.privacy.ledger import Ledger

ROUNDS = 3


def budget_of(folder: Path, *, max_epsilon: float) -> Budget:
    study = load_study(write_study(folder, rounds=ROUNDS))
    noise = calibrate(epsilon=4.0, delta=1e-5, sample_rate=0.3, steps=ROUNDS)
    plan = SitePlan(weight=100, sample_rate=0.3, steps=1, rounds=ROUNDS, noise_multiplier=noise)
    site = Site.model_validate(
        {
            "site": {"name": "a", "simulated": True},
            "data": {
                "source": "embedded",
                "dataset": "heart-disease",
                "partition": "va",
                "public_size": 200,
            },
            "policy": {"tasks": ["heart-disease"], "max_epsilon": max_epsilon},
        }
    )
    ledger = Ledger.open(None, identity=Identity.generate_site(), site="a", simulated=True)
    budget = Budget(site, study, plan, ledger)
    budget.allot()
    return budget


def run_round(budget: Budget, number: int) -> None:
    reservation = budget.reserve_round(number)
    budget.ledger.settle(reservation, update_digest=f"{number:064x}")


def test_a_round_that_crashed_is_paid_again_and_the_last_round_is_still_there(
    tmp_path: Path,
) -> None:
    budget = budget_of(tmp_path, max_epsilon=8.0)
    budget.reserve_round(1)  # and the site dies

    for number in range(1, ROUNDS + 1):
        run_round(budget, number)

    reserved = [e.round_number for e in budget.ledger.entries() if e.kind == "reserve"]
    assert reserved == [1, 1, 2, 3]
    assert budget.ledger.spent(1e-5).epsilon > 4.0
    budget.ledger.verify()


def test_a_repeated_round_is_refused_where_the_sites_limit_is_reached(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_epsilon=4.0)
    budget.reserve_round(1)
    before = budget.ledger.head

    with pytest.raises(BudgetExceeded):
        budget.reserve_round(1)

    assert budget.ledger.head == before


def test_a_study_of_which_a_round_was_repeated_is_admitted_again(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_epsilon=8.0)
    budget.reserve_round(1)
    run_round(budget, 1)
    before = budget.ledger.head

    budget.allot()  # as after every restart of the coordinator

    assert budget.ledger.head == before
    for number in range(2, ROUNDS + 1):
        run_round(budget, number)


def test_a_round_beyond_the_study_is_refused(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_epsilon=8.0)
    for number in range(1, ROUNDS + 1):
        run_round(budget, number)

    with pytest.raises(BudgetExceeded):
        budget.reserve_round(ROUNDS + 1)
