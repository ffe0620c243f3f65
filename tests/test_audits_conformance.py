from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from fedward.client.conformance import audit_one, combinations
from fedward.client.training.plan import Mode
from fedward.privacy.audits.conformance import (
    ConformanceReport,
    Records,
    Trial,
    check_conformance,
)
from fedward.privacy.mechanisms import add_noise, simulated_source


@pytest.mark.parametrize(("family", "mode"), list(combinations()))
def test_every_mode_conforms_on_every_family(family: str, mode: Mode) -> None:
    result = audit_one(family, mode)

    assert result["passed"], result


@dataclass
class ByHand:
    """DP-SGD of a linear model with squared loss in NumPy, with ways to break it."""

    noise_factor: float = 1.0
    clipping: str = "patient"
    sampling: str = "poisson"
    rate_factor: float = 1.0
    own_noise: bool = False

    def __call__(self, trial: Trial) -> NDArray[np.float32]:
        start = np.linspace(-0.1, 0.1, trial.features.shape[1])
        weights = start.copy()
        patients = int(trial.units.max()) + 1
        order = np.random.default_rng().permutation(patients)
        for step in range(trial.steps):
            chosen = self._sample(trial, patients, order, step)
            total = self._clipped_sum(trial, weights, chosen)
            noise = simulated_source("fixed") if self.own_noise else trial.noise
            released = add_noise(
                total,
                std=self.noise_factor * trial.noise_multiplier * trial.clip_norm,
                sensitivity=trial.clip_norm,
                source=noise,
            )
            weights -= trial.learning_rate * released / trial.expected_batch_size
        return (weights - start).astype(np.float32)

    def _sample(
        self, trial: Trial, patients: int, order: NDArray[np.int64], step: int
    ) -> NDArray[np.int64]:
        rate = min(1.0, trial.sample_rate * self.rate_factor)
        if self.sampling == "poisson" or trial.sample_rate == 1:
            return np.flatnonzero(trial.noise.uniform(patients) < rate)
        size = int(patients * rate)
        if self.sampling == "fixed size":
            return np.random.default_rng().permutation(patients)[:size]
        if self.sampling == "shuffled, sizes drawn":
            return order[step * size : step * size + np.random.binomial(patients, rate)]  # noqa: NPY002
        if self.sampling == "with replacement":
            return np.random.default_rng().integers(0, patients, size)
        return np.roll(np.arange(patients), -step * size)[:size]  # in the order of the file

    def _clipped_sum(
        self, trial: Trial, weights: NDArray[np.float64], chosen: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        x = trial.features.astype(np.float64)
        gradients = ((x @ weights) - trial.labels)[:, None] * x
        groups = [gradients[trial.units == patient] for patient in chosen]
        if self.clipping == "record":
            return _add([_clip(g, trial.clip_norm) for group in groups for g in group], weights)
        sums = [group[: trial.max_records].sum(0) for group in groups]
        if self.clipping == "none":
            return _add(sums, weights)
        if self.clipping == "sum":
            return _clip(_add(sums, weights), trial.clip_norm)
        if self.clipping == "mean":
            bound = trial.clip_norm * max(1, len(sums))
            return _clip(_add(sums, weights), bound)
        if self.clipping == "layer":
            half = len(weights) // 2
            sums = [
                np.concatenate([_clip(g[:half], trial.clip_norm), _clip(g[half:], trial.clip_norm)])
                for g in sums
            ]
            return _add(sums, weights)
        return _add([_clip(g, trial.clip_norm) for g in sums], weights)


def _add(parts: list[NDArray[np.float64]], like: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sum(parts, axis=0) if parts else np.zeros_like(like)


def _clip(vector: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    return vector * min(1.0, bound / (float(np.linalg.norm(vector)) + 1e-9))


def audit(trainer: ByHand) -> ConformanceReport:
    rng = np.random.default_rng(3)
    records = Records(
        features=rng.standard_normal((20, 10_000)).astype(np.float32),
        labels=rng.integers(0, 2, 20).astype(np.float32),
    )
    return check_conformance(trainer, records)


NOISE, SENSITIVITY, PARTICIPATION, PATIENTS = range(4)


def test_a_trainer_that_is_right_passes() -> None:
    assert audit(ByHand()).passed


@pytest.mark.parametrize(
    ("trainer", "fails"),
    [
        (ByHand(noise_factor=0.98), [NOISE]),
        (ByHand(noise_factor=0.5), [NOISE]),
        (ByHand(own_noise=True), [NOISE]),
        (ByHand(clipping="none"), [SENSITIVITY, PATIENTS]),
        (ByHand(clipping="layer"), [SENSITIVITY, PATIENTS]),
        (ByHand(clipping="sum"), [SENSITIVITY]),
        (ByHand(clipping="mean"), [SENSITIVITY]),
        (ByHand(clipping="record"), [PATIENTS]),
        (ByHand(sampling="fixed size"), [PARTICIPATION]),
        (ByHand(sampling="shuffled, sizes drawn"), [PARTICIPATION]),
        (ByHand(sampling="with replacement"), [PARTICIPATION]),
        (ByHand(sampling="in order"), [PARTICIPATION]),
        (ByHand(rate_factor=1.2), [PARTICIPATION]),
    ],
)
def test_a_trainer_broken_on_purpose_is_caught(trainer: ByHand, fails: list[int]) -> None:
    checks = audit(trainer).checks

    for check in fails:
        assert not checks[check].passed, checks[check]
    if fails == [PARTICIPATION]:  # nothing else sees fake Poisson sampling
        assert all(check.passed for i, check in enumerate(checks) if i != PARTICIPATION)
    if fails == [NOISE] and not trainer.own_noise:
        assert all(check.passed for i, check in enumerate(checks) if i != NOISE)


def test_a_right_trainer_is_not_blamed() -> None:
    """Ten audits with three tests each of false-alarm rate 1e-9."""
    rng = np.random.default_rng(3)
    records = Records(
        features=rng.standard_normal((20, 200)).astype(np.float32),
        labels=rng.integers(0, 2, 20).astype(np.float32),
    )

    for _ in range(10):
        assert check_conformance(ByHand(), records, noise_samples=2_000, runs=30).passed


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match="20 records"):
        check_conformance(ByHand(), Records(features=np.zeros((3, 2)), labels=np.zeros(3)))
