import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training.plan import MODES, Mode
from fedward.client.training.trial import trainer_of
from fedward.privacy.audits.conformance import (
    ConformanceReport,
    Records,
    Trial,
    check_conformance,
)
from fedward.privacy.mechanisms import add_noise, simulated_source


class Text(nn.Module):
    def __init__(self, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(4000, 8)
        self.cell = cell
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.words(x)
        if self.cell is not None:
            h = self.cell(h)[0]
        return self.head(h.mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return (x + torch.softmax(q @ k.transpose(1, 2), -1) @ v,)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(8000, 3),
    "perceptron": lambda: nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 3)),
    "convolutional": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 64),
        nn.Tanh(),
        nn.Linear(64, 3),
    ),
    "text": Text,
    "transformer": lambda: Text(Attention()),
    "recurrent": lambda: Text(nn.GRU(8, 8, batch_first=True)),
}


def records_of(family: str) -> Records:
    rng = np.random.default_rng(1)
    shape = {"logistic": (8000,), "perceptron": (200,), "convolutional": (1, 8, 8)}.get(family)
    features: NDArray[Any]
    if shape is None:
        features = rng.integers(0, 4000, (20, 4))
    else:
        features = rng.standard_normal((20, *shape)).astype(np.float32)
    return Records(features=features, labels=rng.integers(0, 3, 20))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


def combinations() -> list[tuple[str, Mode]]:
    return [
        (family, mode)
        for family in FAMILIES
        for mode in MODES
        if (mode != "closed-form" or family == "logistic")
        and (mode != "ghost" or family != "recurrent")
    ]


@pytest.mark.parametrize(("family", "mode"), combinations())
def test_every_mode_conforms_on_every_family(family: str, mode: Mode) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    trainer = trainer_of(lambda: copy.deepcopy(model), cross_entropy, mode=mode)

    report = check_conformance(
        trainer, records_of(family), max_records=1 if mode == "ghost" else 5, runs=12
    )

    assert report.passed, report
    assert report.to_json()["passed"]


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
