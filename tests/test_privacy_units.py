from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.special import ndtr

from fedward.privacy.accounting import (
    compose,
    dp_sgd_event,
    gaussian_event,
    privacy_spent,
    zcdp_event,
)
from fedward.privacy.units import patient_guarantee, worst_guarantees

DELTA = 1e-5


@pytest.mark.parametrize(("records", "epsilon"), [(1, 2.00), (2, 4.48), (5, 13.8), (10, 34.9)])
def test_what_two_per_record_means_for_a_patient_with_more(records: int, epsilon: float) -> None:
    # 5,000 rows in batches of 64, 1,000 steps, at delta 1e-4.
    event = dp_sgd_event(noise_multiplier=1.0, sample_rate=64 / 5000, steps=1000)

    spent = patient_guarantee(event, records=records, delta=1e-4)

    assert spent.epsilon == pytest.approx(epsilon, rel=0.005)
    assert spent.unit == "patient"
    assert spent.epsilon <= spent.epsilon_rdp < 1.35 * spent.epsilon


def test_one_record_is_one_record() -> None:
    event = compose(
        [
            dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=100),
            gaussian_event(8.0),
            zcdp_event(0.001),
        ]
    )

    patient = patient_guarantee(event, records=1, delta=DELTA)

    record = privacy_spent(event, delta=DELTA, unit="record")
    assert patient.epsilon == pytest.approx(record.epsilon, abs=0.02)
    assert patient.epsilon_rdp == pytest.approx(record.epsilon_rdp, rel=0.01)


def test_without_sampling_records_multiply_the_sensitivity() -> None:
    spent = patient_guarantee(gaussian_event(6.0), records=3, delta=DELTA)

    expected = privacy_spent(gaussian_event(2.0), delta=DELTA, unit="patient")
    assert spent.epsilon == pytest.approx(expected.epsilon, abs=0.01)
    assert spent.epsilon_rdp == pytest.approx(expected.epsilon_rdp, rel=0.01)


def test_one_step_costs_a_patient_what_the_integral_says() -> None:
    noise, rate, records = 1.5, 0.3, 3
    spent = patient_guarantee(
        dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=1),
        records=records,
        delta=1e-3,
    )

    # delta(epsilon) = P(x > t) - e^epsilon Q(x > t), with t where the densities' ratio is
    # e^epsilon: P a mixture over the binomial number of records, Q without the patient.
    weights = [math.comb(records, i) * rate**i * (1 - rate) ** (records - i) for i in range(4)]
    t = np.linspace(-10, 15, 200_001)
    upper = sum(w * ndtr(-(t - i) / noise) for i, w in enumerate(weights))
    lower = ndtr(-t / noise)
    exact = float(np.max(upper - math.exp(spent.epsilon) * lower))
    assert exact <= 1e-3
    assert exact == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(
    ("noise", "rate", "records", "steps"),
    [(1.0, 64 / 5000, 10, 1000), (4.0, 0.3, 5, 30), (2.0, 1.0, 3, 4), (30.0, 0.9, 10, 100)],
)
def test_the_loss_of_a_mixture_is_that_of_dp_accounting(
    noise: float, rate: float, records: int, steps: int
) -> None:
    weights = [
        math.comb(records, i) * rate**i * (1 - rate) ** (records - i) for i in range(records + 1)
    ]
    theirs = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, list(range(records + 1)), weights, value_discretization_interval=5e-3
    ).self_compose(steps)

    event = dp_sgd_event(noise_multiplier=noise, sample_rate=rate, steps=steps)
    for delta in (1e-3, 1e-5, 1e-8):
        ours = patient_guarantee(event, records=records, delta=delta)
        assert ours.epsilon == pytest.approx(theirs.get_epsilon_for_delta(delta), abs=1e-5)


def test_what_was_charged_per_patient_is_borne_once_however_many_records() -> None:
    per_record = dp_sgd_event(noise_multiplier=2.0, sample_rate=0.1, steps=20)
    per_patient = gaussian_event(2.0)

    both = patient_guarantee(per_record, records=5, delta=DELTA, beside=per_patient)

    alone = patient_guarantee(per_record, records=5, delta=DELTA)
    as_records = patient_guarantee(compose([per_record, per_patient]), records=5, delta=DELTA)
    assert alone.epsilon < both.epsilon < as_records.epsilon
    nothing = patient_guarantee(compose([]), records=5, delta=DELTA, beside=per_patient)
    expected = privacy_spent(per_patient, delta=DELTA, unit="patient")
    assert nothing.epsilon == pytest.approx(expected.epsilon, abs=0.02)


def test_of_several_sites_the_worst_figure_stands_for_each_number_of_records() -> None:
    def table(*epsilons: float | None) -> list[dict[str, float | None]]:
        return [{"records": k, "epsilon": e} for k, e in zip((2, 5), epsilons, strict=True)]

    assert worst_guarantees([table(3.0, 9.0), table(4.0, 8.0)]) == table(4.0, 9.0)
    assert worst_guarantees([table(3.0, None), table(4.0, 8.0)]) == table(4.0, None)
    assert worst_guarantees([table(3.0, 9.0), []]) == []
    assert worst_guarantees([]) == []


@pytest.mark.parametrize(("records", "delta"), [(0, 1e-5), (-1, 1e-5), (2, 0.0), (2, 1.0)])
def test_senseless_questions_are_refused(records: int, delta: float) -> None:
    with pytest.raises(ValueError, match=r"records|delta"):
        patient_guarantee(gaussian_event(1.0), records=records, delta=delta)


def test_a_patient_without_protection_is_priced_without_exhausting_memory() -> None:
    event = dp_sgd_event(noise_multiplier=0.05, sample_rate=0.5, steps=10_000)

    spent = patient_guarantee(event, records=10, delta=DELTA)

    assert spent.epsilon > 1e4
    assert spent.accountant == "rdp"
