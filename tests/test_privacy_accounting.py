from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.privacy.accounting import (
    DpEvent,
    PrivacySpent,
    adaptive_clipping_event,
    calibrate,
    calibrate_gaussian,
    compose,
    discrete_gaussian_event,
    dp_sgd_event,
    gaussian_event,
    privacy_spent,
    zcdp_event,
)
from fedward.privacy.accounting.events import Leaf
from fedward.privacy.accounting.pricing import GRID, clear_cache, pld_epsilon

DELTA = 1e-5

# Few values, so that the loss distributions, which take a tenth of a second each, are reused.
NOISES = st.sampled_from([1.5, 4.0])
RATES = st.sampled_from([0.01, 0.1, 1.0])


@st.composite
def parts(draw: st.DrawFn) -> DpEvent:
    kind = draw(st.sampled_from(["sgd", "sgd", "gaussian", "zcdp"]))
    if kind == "gaussian":
        return gaussian_event(draw(st.sampled_from([3.0, 8.0])))
    if kind == "zcdp":
        return zcdp_event(draw(st.sampled_from([0.002, 0.02])))
    return dp_sgd_event(
        noise_multiplier=draw(NOISES),
        sample_rate=draw(RATES),
        steps=draw(st.sampled_from([1, 7, 50])),
    )


def epsilon(event: DpEvent, delta: float = DELTA) -> float:
    return privacy_spent(event, delta=delta, unit="patient").epsilon


def opacus_epsilon(name: str, noise: float, rate: float, steps: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import accountants

        accountant: Any = getattr(accountants, name)()
        accountant.history = [(noise, rate, steps)]
        return float(accountant.get_epsilon(DELTA))


# n = 300, 5,000 and 50,000 with batches of 32, 64 and 256.
TABLE = list(itertools.product([32 / 300, 64 / 5000, 256 / 50_000], [0.7, 1.0, 2.0], [50, 1000]))


@pytest.mark.parametrize(("rate", "noise", "steps"), TABLE)
def test_the_accountants_of_opacus_stand_beside_ours(rate: float, noise: float, steps: int) -> None:
    spent = privacy_spent(
        dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=steps),
        delta=DELTA,
        unit="record",
    )

    # Opacus' PRV accountant adds its error of .01 to what it finds.
    if spent.epsilon < 4:  # slow above: it took 8 s at 58
        prv = opacus_epsilon("PRVAccountant", noise, rate, steps)
        assert prv - 0.015 < spent.epsilon < prv
    # Fractional orders that do not converge are left out by dp-accounting, and only there
    # is its RDP above that of Opacus.
    rdp = opacus_epsilon("RDPAccountant", noise, rate, steps)
    assert spent.epsilon_rdp >= rdp * (1 - 1e-3)
    if rdp < 10:
        assert spent.epsilon_rdp == pytest.approx(rdp, rel=2e-3)
    assert spent.epsilon <= spent.epsilon_rdp
    assert spent.note == ""


@pytest.mark.parametrize(("rate", "noise", "steps"), TABLE[::3])
def test_both_figures_are_those_of_dp_accounting(rate: float, noise: float, steps: int) -> None:
    event = dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=steps)

    spent = privacy_spent(event, delta=DELTA, unit="record")

    theirs = PLDAccountant(value_discretization_interval=GRID).compose(event)
    assert spent.epsilon == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-6)
    assert spent.epsilon_rdp == pytest.approx(
        RdpAccountant().compose(event).get_epsilon(DELTA), abs=1e-6
    )


def test_a_single_gaussian_has_its_closed_form() -> None:
    from scipy.stats import norm

    for noise in (0.8, 2.0, 10.0):
        bound = epsilon(gaussian_event(noise))

        # Balle and Wang 2018, theorem 8.
        a, b = 1 / (2 * noise), bound * noise
        exact = norm.cdf(a - b) - math.exp(bound) * norm.cdf(-a - b)
        assert exact <= DELTA
        assert exact == pytest.approx(DELTA, rel=0.02)


def test_composition_of_different_mechanisms_agrees_with_dp_accounting() -> None:
    event = compose(
        [
            dp_sgd_event(noise_multiplier=1.1, sample_rate=0.02, steps=300),
            gaussian_event(6.0),
            dp_sgd_event(noise_multiplier=2.0, sample_rate=0.2, steps=40),
            gaussian_event(9.0),
        ]
    )

    theirs = PLDAccountant(value_discretization_interval=GRID).compose(event)

    assert epsilon(event) == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-3)


def test_a_zcdp_mechanism_costs_at_least_what_the_gaussian_it_bounds_costs() -> None:
    for noise in (0.7, 2.0, 8.0):
        bound = epsilon(discrete_gaussian_event(noise))

        assert bound >= epsilon(gaussian_event(noise))
        spent = privacy_spent(discrete_gaussian_event(noise), delta=DELTA, unit="site")
        # The same bound, converted on a finer set of orders than dp-accounting's.
        assert bound <= spent.epsilon_rdp + GRID
        assert bound == pytest.approx(spent.epsilon_rdp, rel=0.01)


def test_zcdp_composes_with_everything_else() -> None:
    sgd = dp_sgd_event(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    many = compose([zcdp_event(0.001)] * 20)

    assert epsilon(many) == pytest.approx(epsilon(zcdp_event(0.02)), abs=1e-9)
    assert epsilon(compose([sgd, many])) < epsilon(sgd, DELTA / 2) + epsilon(many, DELTA / 2)
    assert epsilon(compose([sgd, many])) > max(epsilon(sgd), epsilon(many))


@settings(max_examples=20, deadline=None)
@given(first=st.lists(parts(), max_size=3), more=parts())
def test_epsilon_never_falls_as_events_are_added(first: list[DpEvent], more: DpEvent) -> None:
    before = privacy_spent(compose(first), delta=DELTA, unit="patient")

    after = privacy_spent(compose([*first, more]), delta=DELTA, unit="patient")

    # 1e-9 is the rounding of the convolutions.
    assert after.epsilon >= before.epsilon - 1e-9
    assert after.epsilon_rdp >= before.epsilon_rdp - 1e-9


@settings(max_examples=20, deadline=None)
@given(events=st.lists(parts(), min_size=2, max_size=4))
def test_joint_composition_is_never_above_the_sum(events: list[DpEvent]) -> None:
    """Basic composition: epsilon at delta is at most the sum of epsilons at shares of delta."""
    joint = epsilon(compose(events))

    separate = sum(epsilon(event, DELTA / len(events)) for event in events)

    assert joint <= separate + 1e-9


def test_joint_composition_is_far_below_the_sum() -> None:
    rounds = [dp_sgd_event(noise_multiplier=1.0, sample_rate=0.01, steps=20)] * 100

    assert epsilon(compose(rounds)) < sum(epsilon(event) for event in rounds) / 10


@settings(max_examples=20, deadline=None)
@given(events=st.permutations(range(4)).map(list))
def test_neither_order_nor_grouping_changes_a_price(events: list[int]) -> None:
    pool = [
        dp_sgd_event(noise_multiplier=1.5, sample_rate=0.1, steps=7),
        gaussian_event(3.0),
        dp_sgd_event(noise_multiplier=4.0, sample_rate=0.01, steps=50),
        zcdp_event(0.002),
    ]
    first, second, third, fourth = (pool[i] for i in events)

    grouped = compose([compose([first, second]), compose([third, compose([fourth])])])

    assert epsilon(grouped) == epsilon(compose(pool))


@pytest.fixture
def forgetful() -> Iterator[None]:
    clear_cache()
    yield
    clear_cache()


@pytest.mark.usefixtures("forgetful")
def test_the_cache_agrees_with_composing_from_nothing() -> None:
    kinds = [
        Leaf("poisson-gaussian", (0.1, 1.5)),
        Leaf("poisson-gaussian", (0.01, 0.9)),
        Leaf("gaussian", (5.0,)),
        Leaf("zcdp", (0.002,)),
        Leaf("poisson-gaussian", (0.05, 2.0)),
    ]
    total: Counter[Leaf] = Counter()
    grown = []
    for number in range(10):
        total[kinds[number % len(kinds)]] += 1 + number
        grown.append((total.copy(), pld_epsilon(total, delta=DELTA)))

    for counted, from_cache in grown[::3]:
        clear_cache()
        assert pld_epsilon(counted, delta=DELTA) == pytest.approx(from_cache, abs=1e-6)


@pytest.mark.usefixtures("forgetful")
def test_one_more_round_on_a_thousand_is_priced_in_a_tenth_of_a_second() -> None:
    # 1,000 rounds of ten studies, each with a noise of its own; then each goes on by a round.
    studies = [
        dp_sgd_event(noise_multiplier=4.0 + number / 4, sample_rate=0.05, steps=10)
        for number in range(10)
    ]
    ledger = studies * 100
    epsilon(compose(ledger))

    seconds = []
    for study in studies[:5]:
        ledger.append(study)
        start = time.process_time()
        privacy_spent(compose(ledger), delta=DELTA, unit="patient")
        seconds.append(time.process_time() - start)

    assert sorted(seconds)[2] < 0.1  # the median


@pytest.mark.parametrize(
    ("budget", "rate", "steps"),
    [(0.25, 0.05, 600), (1.0, 0.01, 1000), (8.0, 0.2, 3000), (3.0, 1.0, 100)],
)
def test_calibration_keeps_the_budget_and_wastes_little(
    budget: float, rate: float, steps: int
) -> None:
    noise = calibrate(epsilon=budget, delta=DELTA, sample_rate=rate, steps=steps)

    spent = epsilon(dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=steps))
    assert budget * (1 - 1e-3) < spent <= budget


@pytest.mark.parametrize(("budget", "rate", "steps"), [(1.0, 0.01, 1000)])
def test_calibration_agrees_with_dp_accounting(budget: float, rate: float, steps: int) -> None:
    theirs = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(value_discretization_interval=GRID),
        lambda noise: dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=steps),
        budget,
        DELTA,
        dp_accounting.ExplicitBracketInterval(0.5, 20),
        tol=1e-5,
    )

    ours = calibrate(epsilon=budget, delta=DELTA, sample_rate=rate, steps=steps)

    assert ours == pytest.approx(theirs, abs=1e-3)


def test_calibration_of_one_release_and_of_hopeless_budgets() -> None:
    noise = calibrate_gaussian(epsilon=1.0, delta=DELTA)

    assert 0.999 < epsilon(gaussian_event(noise)) <= 1.0
    assert calibrate(epsilon=200.0, delta=DELTA, sample_rate=1.0, steps=1) == 0.1
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            calibrate(epsilon=bad, delta=DELTA, sample_rate=0.1, steps=10)
    with pytest.raises(ValueError, match="at least 1"):
        calibrate(epsilon=1.0, delta=DELTA, sample_rate=0.1, steps=0)


def test_adaptive_clipping_is_charged_for_both_of_its_releases() -> None:
    plain = dp_sgd_event(noise_multiplier=1.0, sample_rate=0.05, steps=200)
    adaptive = adaptive_clipping_event(
        noise_multiplier=1.0, quantile_noise=4.0, sample_rate=0.05, steps=200
    )
    quantile = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.05, steps=200)

    # A unit is in both releases of a step or in neither, which costs more than two samplings.
    assert epsilon(plain) < epsilon(compose([plain, quantile])) < epsilon(adaptive)
    # Without sampling the two are independent Gaussian releases, exactly.
    whole = adaptive_clipping_event(
        noise_multiplier=3.0, quantile_noise=4.0, sample_rate=1.0, steps=1
    )
    both = compose([gaussian_event(3.0), gaussian_event(4.0)])
    assert epsilon(whole) == pytest.approx(epsilon(both), abs=1e-9)


def test_nothing_costs_nothing() -> None:
    for event in (compose([]), dp_sgd_event(noise_multiplier=1.0, sample_rate=0.1, steps=0)):
        spent = privacy_spent(event, delta=DELTA, unit="patient")
        assert (spent.epsilon, spent.epsilon_rdp, spent.note) == (0.0, 0.0, "")


@pytest.mark.parametrize("noise", [1e-6, 0.05, 0.11])
def test_a_run_without_protection_is_priced_without_exhausting_memory(noise: float) -> None:
    event = dp_sgd_event(noise_multiplier=noise, sample_rate=1.0, steps=1_000_000_000)

    spent = privacy_spent(event, delta=DELTA, unit="patient")

    assert spent.epsilon > 1e6
    assert spent.accountant == "rdp"
    assert "RDP" in spent.note
    json.dumps(spent.to_json(), allow_nan=False)


@pytest.mark.parametrize("delta", [1e-11, 1e-13])
def test_a_delta_that_convolutions_do_not_resolve_is_left_to_rdp(delta: float) -> None:
    event = dp_sgd_event(noise_multiplier=2.0, sample_rate=0.1, steps=100)

    spent = privacy_spent(event, delta=delta, unit="patient")

    assert (spent.accountant, spent.epsilon) == ("rdp", spent.epsilon_rdp)
    assert "delta is too small" in spent.note


def test_ten_thousand_steps_have_at_least_their_exact_price() -> None:
    from scipy.stats import norm

    # Sampled at a rate that is one but for rounding, so that the steps are convolved one by one
    # and yet known in closed form.
    event = dp_sgd_event(noise_multiplier=150.0, sample_rate=1 - 1e-9, steps=10_000)

    for delta in (1e-5, 1e-8, 1e-10):
        bound, mu = epsilon(event, delta), 100 / 150

        exact = norm.sf(bound / mu - mu / 2) - math.exp(bound) * norm.sf(bound / mu + mu / 2)
        assert exact <= delta
        assert exact == pytest.approx(delta, rel=0.1)


def test_a_report_in_which_pld_is_larger_says_so() -> None:
    # A million steps with next to no sampling: rounding up each loss to the grid adds up.
    event = dp_sgd_event(noise_multiplier=50.0, sample_rate=0.001, steps=1_000_000)

    spent = privacy_spent(event, delta=DELTA, unit="patient")

    assert spent.epsilon > spent.epsilon_rdp + GRID
    assert "PLD is above RDP" in spent.note
    assert "PLD is above RDP" in str(spent)


def test_epsilon_travels_with_all_that_it_means_nothing_without() -> None:
    spent = privacy_spent(
        dp_sgd_event(noise_multiplier=2.3476, sample_rate=0.141, steps=200),
        delta=DELTA,
        unit="patient",
    )

    assert str(spent) == (
        "epsilon 4.00 (delta 1e-05, per patient, add-or-remove-one, PLD; RDP 4.36)"
    )
    assert spent.to_json() == {
        "epsilon": spent.epsilon,
        "epsilon_rdp": spent.epsilon_rdp,
        "delta": DELTA,
        "unit": "patient",
        "neighboring_relation": "add-or-remove-one",
        "accountant": "pld",
    }
    unbounded = PrivacySpent(epsilon=math.inf, epsilon_rdp=math.inf, delta=DELTA, unit="site")
    assert unbounded.to_json()["epsilon"] is None


def test_accounting_needs_no_torch_and_starts_fast() -> None:
    program = (
        "import sys; import fedward.privacy.accounting, fedward.privacy.ledger;"
        "print([m for m in ('torch', 'opacus', 'flwr', 'scipy', 'dp_accounting') "
        "if m in sys.modules])"
    )

    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert run.stdout.strip() == "[]"
