from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedward.core.errors import BudgetExceeded, ConfigError
from fedward.core.identity import Identity
from fedward.privacy.accounting import (
    DpEvent,
    Unit,
    compose,
    dp_sgd_event,
    gaussian_event,
    privacy_spent,
)
from fedward.privacy.ledger import Ledger, Population, verify_export

DELTA = 1e-5
STEPS = 10
DIGEST = "ab" * 32


def steps(count: int, *, noise: float = 4.0, rate: float = 0.1) -> DpEvent:
    return dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=count)


def epsilon_of(*events: DpEvent) -> float:
    return privacy_spent(compose(events), delta=DELTA, unit="patient").epsilon


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.open(
        None, identity=Identity.generate_site(), site="cleveland", simulated=True
    ) as opened:
        yield opened


def allot(ledger: Ledger, study: str, event: DpEvent, *, limit: float = 8.0) -> None:
    ledger.allot(study=study, event=event, max_epsilon=limit, delta=DELTA, unit="patient")


def test_a_run_spends_exactly_what_its_rounds_reserved(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(10 * STEPS))

    for round_number in range(1, 4):
        reservation = ledger.reserve(study="heart", round_number=round_number, event=steps(STEPS))
        ledger.settle(reservation, update_digest=DIGEST)

    assert ledger.spent(DELTA).epsilon == pytest.approx(epsilon_of(steps(3 * STEPS)), abs=1e-9)
    assert ledger.spent_by("heart", DELTA) == ledger.spent(DELTA)


def test_nothing_is_spent_by_an_allotment_alone(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(10 * STEPS))

    assert ledger.spent(DELTA).epsilon == 0.0


def test_a_reservation_without_a_settlement_counts_as_spent(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(STEPS))

    ledger.reserve(study="heart", round_number=1, event=steps(STEPS))

    assert ledger.spent(DELTA).epsilon == pytest.approx(epsilon_of(steps(STEPS)))


def test_a_refused_allotment_leaves_no_trace(ledger: Ledger) -> None:
    before = ledger.head

    with pytest.raises(BudgetExceeded) as refusal:
        allot(ledger, "heart", steps(1000), limit=2.0)

    assert ledger.head == before
    assert refusal.value.spent == 0.0
    assert refusal.value.asked == pytest.approx(epsilon_of(steps(1000)))
    assert refusal.value.limit == 2.0


def test_studies_compose_jointly_against_the_limit(ledger: Ledger) -> None:
    first, second = steps(100), steps(100, noise=5.0, rate=0.2)
    joint = epsilon_of(first, second)
    assert joint < epsilon_of(first) + epsilon_of(second)
    allot(ledger, "one", first, limit=joint)

    allot(ledger, "two", second, limit=joint)

    with pytest.raises(BudgetExceeded):
        allot(ledger, "three", steps(1), limit=joint)


def test_the_unused_rest_of_a_closed_study_is_free_again(ledger: Ledger) -> None:
    limit = epsilon_of(steps(100))
    allot(ledger, "one", steps(100), limit=limit)
    ledger.reserve(study="one", round_number=1, event=steps(STEPS))
    with pytest.raises(BudgetExceeded):
        allot(ledger, "two", steps(90), limit=limit)

    ledger.close("one")

    allot(ledger, "two", steps(90), limit=limit)
    with pytest.raises(BudgetExceeded):
        allot(ledger, "three", steps(1), limit=limit)


def test_asking_twice_for_the_same_allotment_grants_it_once(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(100))
    head = ledger.head

    allot(ledger, "heart", steps(100))

    assert ledger.head == head
    with pytest.raises(BudgetExceeded):  # the site has lowered its limit meanwhile
        allot(ledger, "heart", steps(100), limit=0.5)
    with pytest.raises(ValueError, match="another event"):
        allot(ledger, "heart", steps(101))


def test_a_round_does_not_reserve_more_than_the_allotment_holds(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(2 * STEPS))
    for round_number in (1, 2):
        ledger.reserve(study="heart", round_number=round_number, event=steps(STEPS))
    head = ledger.head

    with pytest.raises(BudgetExceeded) as refusal:
        ledger.reserve(study="heart", round_number=3, event=steps(STEPS))

    assert ledger.head == head
    assert refusal.value.asked > refusal.value.limit
    assert refusal.value.limit == pytest.approx(epsilon_of(steps(2 * STEPS)))


def test_a_repeated_round_spends_again_and_needs_an_extension(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(STEPS))
    ledger.reserve(study="heart", round_number=1, event=steps(STEPS))
    ledger.extend(study="heart", event=steps(STEPS), max_epsilon=8.0, delta=DELTA)

    ledger.reserve(study="heart", round_number=1, event=steps(STEPS))

    assert ledger.spent(DELTA).epsilon == pytest.approx(epsilon_of(steps(2 * STEPS)))


def test_a_mechanism_that_was_not_allotted_is_refused(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(100))

    with pytest.raises(ValueError, match="does not hold"):
        ledger.reserve(study="heart", round_number=1, event=steps(1, noise=3.9))
    with pytest.raises(ValueError, match="no open allotment"):
        ledger.reserve(study="lungs", round_number=1, event=steps(1))


def test_one_reservation_permits_one_update(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(100))
    reservation = ledger.reserve(study="heart", round_number=1, event=steps(STEPS))
    assert ledger.settled_digest(study="heart", round_number=1) is None
    ledger.settle(reservation, update_digest=DIGEST)
    head = ledger.head

    ledger.settle(reservation, update_digest=DIGEST)
    with pytest.raises(ValueError, match="another update"):
        ledger.settle(reservation, update_digest="cd" * 32)

    assert ledger.head == head
    assert ledger.settled_digest(study="heart", round_number=1) == DIGEST


def test_populations_bear_what_is_theirs_and_what_is_charged_to_all(ledger: Ledger) -> None:
    training, held_out, everybody = steps(50), gaussian_event(10.0), gaussian_event(20.0)
    allot(ledger, "train", training)
    extra: list[tuple[str, DpEvent, Population]] = [
        ("evaluate", held_out, "held-out"),
        ("count", everybody, "all"),
    ]
    for name, event, population in extra:
        ledger.allot(
            study=name,
            event=event,
            max_epsilon=8.0,
            delta=DELTA,
            unit="patient",
            population=population,
        )

    ledger.reserve(study="train", round_number=1, event=training)
    ledger.reserve(study="evaluate", round_number=1, event=held_out)
    ledger.reserve(study="count", round_number=1, event=everybody)

    of_training = epsilon_of(training, everybody)
    assert ledger.spent(DELTA).epsilon == pytest.approx(of_training)
    assert ledger.spent(DELTA, population="held-out").epsilon == pytest.approx(
        epsilon_of(held_out, everybody)
    )
    assert ledger.spent(DELTA, population="all").epsilon == pytest.approx(of_training)


def test_a_total_is_reported_for_the_smallest_unit_that_was_charged(ledger: Ledger) -> None:
    units: list[tuple[str, Unit, Unit]] = [
        ("a", "site", "patient"),  # whole sites are counted as their patients bear it
        ("b", "patient", "patient"),
        ("c", "record", "record"),
    ]
    for study, unit, reported in units:
        event = gaussian_event(30.0)
        ledger.allot(study=study, event=event, max_epsilon=8.0, delta=DELTA, unit=unit)
        ledger.reserve(study=study, round_number=1, event=event)
        assert ledger.spent(DELTA).unit == reported


def test_what_protects_sites_is_counted_as_their_patients_bear_it(ledger: Ledger) -> None:
    rounds = dp_sgd_event(noise_multiplier=8.0, sample_rate=1.0, steps=10)
    ledger.allot(study="sites", event=rounds, max_epsilon=8.0, delta=DELTA, unit="site")
    for number in range(1, 6):
        ledger.reserve(study="sites", round_number=number, event=gaussian_event(8.0))
    allot(ledger, "patients", steps(STEPS))
    ledger.reserve(study="patients", round_number=1, event=steps(STEPS))

    halved = dp_sgd_event(noise_multiplier=4.0, sample_rate=1.0, steps=5)
    assert ledger.spent_by("sites", DELTA).unit == "site"
    assert ledger.spent_by("sites", DELTA).epsilon == pytest.approx(
        epsilon_of(dp_sgd_event(noise_multiplier=8.0, sample_rate=1.0, steps=5))
    )
    assert ledger.spent(DELTA).epsilon == pytest.approx(epsilon_of(halved, steps(STEPS)))
    assert ledger.history(DELTA)[-1].epsilon == pytest.approx(ledger.spent(DELTA).epsilon)
    ledger.verify()


def test_the_limit_is_held_against_what_a_patient_of_the_site_bears(ledger: Ledger) -> None:
    event = gaussian_event(2.0)
    of_site, of_patient = epsilon_of(event), epsilon_of(gaussian_event(1.0))
    limit = (of_site + of_patient) / 2

    with pytest.raises(BudgetExceeded) as refused:
        ledger.allot(study="s", event=event, max_epsilon=limit, delta=DELTA, unit="site")

    assert refused.value.asked == pytest.approx(of_patient)
    assert of_site < limit < of_patient


def test_whole_sites_that_are_sampled_have_no_price_for_a_patient(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="sampled"):
        ledger.allot(study="s", event=steps(1), max_epsilon=8.0, delta=DELTA, unit="site")

    assert len(ledger.entries()) == 1


def test_entries_tell_the_story(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(2 * STEPS))
    first = ledger.reserve(study="heart", round_number=1, event=steps(STEPS))
    ledger.reserve(study="heart", round_number=2, event=steps(STEPS))
    ledger.settle(first, update_digest=DIGEST)
    ledger.close("heart")

    shown = [(e.seq, e.kind, e.study, e.round_number, e.state) for e in ledger.entries()]

    assert shown == [
        (0, "genesis", "", None, ""),
        (1, "allot", "heart", None, "closed"),
        (2, "reserve", "heart", 1, "settled"),
        (3, "reserve", "heart", 2, "reserved"),
        (4, "settle", "heart", 1, ""),
        (5, "close", "heart", None, ""),
    ]
    assert ledger.entries()[3].event == steps(STEPS)
    assert ledger.entries()[4].update_digest == DIGEST


def test_the_picture_over_time_ends_at_the_total(ledger: Ledger) -> None:
    allot(ledger, "heart", steps(100))
    for round_number in range(1, 10):
        ledger.reserve(study="heart", round_number=round_number, event=steps(STEPS))

    points = ledger.history(DELTA, points=4)

    epsilons = [point.epsilon for point in points]
    assert epsilons == sorted(epsilons)
    assert [point.round_number for point in points] == [3, 6, 9]
    assert epsilons[-1] == pytest.approx(ledger.spent(DELTA).epsilon, abs=1e-6)


def test_what_is_on_disk_is_there_again(tmp_path: Path) -> None:
    path, identity = tmp_path / "state" / "ledger.sqlite", Identity.generate_site()
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        allot(ledger, "heart", steps(100))
        reservation = ledger.reserve(study="heart", round_number=1, event=steps(STEPS))
        spent, head = ledger.spent(DELTA), ledger.head

    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        assert (ledger.spent(DELTA), ledger.head) == (spent, head)
        ledger.settle(reservation, update_digest=DIGEST)
        ledger.verify(against_head=head)
    assert path.stat().st_mode & 0o077 == 0


def test_two_handles_on_one_file_see_each_other(tmp_path: Path) -> None:
    path, identity = tmp_path / "ledger.sqlite", Identity.generate_site()
    with (
        Ledger.open(path, identity=identity, site="va", simulated=False) as one,
        Ledger.open(path, identity=identity, site="va", simulated=False) as two,
    ):
        allot(one, "heart", steps(100))
        two.reserve(study="heart", round_number=1, event=steps(STEPS))

        assert one.head == two.head
        assert one.spent(DELTA) == two.spent(DELTA)


def test_a_ledger_is_not_continued_by_another_kind_of_site_or_key(tmp_path: Path) -> None:
    path, identity = tmp_path / "ledger.sqlite", Identity.generate_site()
    Ledger.open(path, identity=identity, site="va", simulated=True).shut()

    with pytest.raises(ConfigError, match="simulated site va"):
        Ledger.open(path, identity=identity, site="va", simulated=False)
    with pytest.raises(ConfigError, match="another key"):
        Ledger.open(path, identity=Identity.generate_site(), site="va", simulated=True)
    with pytest.raises(ValueError, match="needs a file"):
        Ledger.open(None, identity=identity, site="va", simulated=False)


def test_a_ledger_is_read_and_checked_without_the_private_key(tmp_path: Path) -> None:
    path, identity = tmp_path / "ledger.sqlite", Identity.generate_site()
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        allot(ledger, "heart", steps(100))
        exported = ledger.export()

    with Ledger.read(path, public=identity.public) as reader:
        reader.verify(against_head=exported["head"])
        assert (reader.site, reader.simulated) == ("va", False)
        with pytest.raises(ValueError, match="opened to be read"):
            reader.close("heart")
    verify_export(exported, public=identity.public)


def test_simulated_ledgers_cost_next_to_nothing() -> None:
    identity = Identity.generate_site()
    ledgers = [
        Ledger.open(None, identity=identity, site=f"site-{i}", simulated=True) for i in range(4)
    ]
    for ledger in ledgers:
        allot(ledger, "heart", steps(100 * STEPS))

    start = time.process_time()
    for ledger in ledgers:
        for round_number in range(1, 101):
            reservation = ledger.reserve(
                study="heart", round_number=round_number, event=steps(STEPS)
            )
            ledger.settle(reservation, update_digest=DIGEST)
    seconds = time.process_time() - start

    assert seconds < 1.0  # measured: 0.15
    assert all(ledger.simulated for ledger in ledgers)
