"""Does a trainer do what its privacy statement says? Four checks from outside, in seconds.

An accountant prices the mechanism that a trainer is said to run. These checks look at the one
that runs, through its updates alone: (a) the standard deviation of its noise, (b) how far any
record moves the clipped sum, (c) who takes part in its steps, (d) how far a patient with many
records moves the sum. A trainer passes all four or its epsilon means nothing; passing does not
prove it right.

The trainer is called with a `NoiseSource`, as in production; where a check needs the sum
without noise it hands over a source whose noise is zero. A trainer that draws noise from
elsewhere is caught by that.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedward.privacy.mechanisms import NoiseSource, secure_source

FALSE_ALARM = 1e-9
"""Rate at which each statistical check fails a trainer that is right."""

_TOLERANCE = 1e-3  # of the bound: float32 sums, and the grid that noise is rounded to
_QUIET = 1e-3  # noise multiplier where noise is silenced, so that the grid is fine
_SLOW = 1e-3  # learning rate at which a few steps add up as if they were one


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One call of the trainer: plain SGD from always the same parameters.

    Attributes:
        features: Shape `(num_records, ...)`.
        labels: Shape `(num_records, ...)`.
        units: Shape `(num_records,)`, from 0: which patient a record is of.
        clip_norm: Bound on one patient's part in a step.
        noise_multiplier: Standard deviation of the noise over `clip_norm`.
        sample_rate: Probability with which a patient is in a step.
        expected_batch_size: What sums are divided by.
        max_records: How many records of one patient a step uses at most.
        steps: Number of steps.
        learning_rate: Of SGD without momentum.
        noise: The source of sampling and noise.
    """

    features: NDArray[Any]
    labels: NDArray[Any]
    units: NDArray[np.int64]
    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    max_records: int
    steps: int
    learning_rate: float
    noise: NoiseSource


Trainer = Callable[[Trial], NDArray[np.float32]]
"""Runs a trial and gives the update: trained minus given parameters, flat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What the trainer is tried on: public or random records, never patients.

    Attributes:
        features: Shape `(num_records, ...)`, 20 records or more, all different.
        labels: Shape `(num_records, ...)`.
    """

    features: NDArray[Any]
    labels: NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one check found.

    Attributes:
        name: Which check.
        passed: Whether the trainer conforms.
        value: What was measured: a ratio to what it should be, at most or about 1.
        p_value: Of a statistical check, how likely a right trainer is to look like this.
        detail: In words.
    """

    name: str
    passed: bool
    value: float
    p_value: float | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformanceReport:
    """All checks of one trainer."""

    checks: tuple[Check, ...]
    seconds: float
    false_alarm: float = field(default=FALSE_ALARM)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value."""
        return {"passed": self.passed, **asdict(self)}


def check_conformance(
    trainer: Trainer,
    records: Records,
    *,
    clip_norm: float = 0.5,
    max_records: int = 5,
    noise_samples: int = 200_000,
    runs: int = 120,
) -> ConformanceReport:
    """Run all four checks.

    Args:
        trainer: Under test.
        records: What it is tried on.
        clip_norm: The bound that is tried; gradients of typical records should be longer.
        max_records: Of a patient, that the trainer is told to use; 1 if it knows no more.
        noise_samples: At least this many draws of noise; with 200,000 a deficit of 2% is
            flagged with power above .999.
        runs: Calls of each kind from which participation is counted.

    Raises:
        ValueError: There are too few records.
    """
    if len(records.features) < _PATIENTS:
        raise ValueError(f"needs {_PATIENTS} records or more, got {len(records.features)}")
    started = time.monotonic()
    bench = _Bench(trainer, records, clip_norm=clip_norm, max_records=max_records)
    checks = (
        bench.noise(noise_samples),
        bench.sensitivity(),
        bench.participation(runs),
        bench.patients(),
    )
    return ConformanceReport(checks=checks, seconds=time.monotonic() - started)


_PATIENTS = 20
_RATE = 0.25


class _Silent:
    """Sampling as in production, and no noise."""

    private = False

    def __init__(self) -> None:
        self._source = secure_source()

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:  # noqa: ARG002 (none at all)
        return np.zeros(size)

    def uniform(self, size: int) -> NDArray[np.float64]:
        return self._source.uniform(size)


class _Bench:
    def __init__(
        self, trainer: Trainer, records: Records, *, clip_norm: float, max_records: int
    ) -> None:
        self._trainer, self._clip_norm, self._max_records = trainer, clip_norm, max_records
        self._features = np.asarray(records.features)[:_PATIENTS]
        self._labels = np.asarray(records.labels)[:_PATIENTS]
        self._batch_size = 5.0

    def _sum(
        self,
        features: NDArray[Any],
        labels: NDArray[Any],
        units: NDArray[np.int64] | None = None,
        *,
        sample_rate: float = 1.0,
        noise_multiplier: float = _QUIET,
        noise: NoiseSource | None = None,
        steps: int = 1,
        learning_rate: float = 1.0,
    ) -> NDArray[np.float64]:
        """What the trainer released, before averaging and stepping: clipped sum and noise."""
        update = self._trainer(
            Trial(
                features=features,
                labels=labels,
                units=np.arange(len(features)) if units is None else units,
                clip_norm=self._clip_norm,
                noise_multiplier=noise_multiplier,
                sample_rate=sample_rate,
                expected_batch_size=self._batch_size,
                max_records=self._max_records,
                steps=steps,
                learning_rate=learning_rate,
                noise=_Silent() if noise is None else noise,
            )
        )
        return np.asarray(update, dtype=np.float64) * (-self._batch_size / learning_rate)

    def noise(self, samples: int) -> Check:
        """(a) Noise minus the sum without it: variance against chi-square, and no repetition."""
        name, multiplier = "noise has the calibrated standard deviation", 1.5
        expected = multiplier * self._clip_norm
        still = self._sum(self._features, self._labels)
        squares, count, repeats, previous = 0.0, 0, 1.0, None
        source = secure_source()
        while count < samples:
            released = self._sum(
                self._features, self._labels, noise_multiplier=multiplier, noise=source
            )
            drawn = (released - still) / expected
            squares, count = squares + float(drawn @ drawn), count + drawn.size
            if previous is not None:
                # Independent vectors have a normal inner product; repeated noise does not.
                inner = float(drawn @ previous) / np.sqrt(drawn.size)
                repeats = min(repeats, 2 * float(stats.norm.sf(abs(inner))))
            previous = drawn
        runs = count // still.size
        spread = 2 * min(stats.chi2.cdf(squares, count), stats.chi2.sf(squares, count))
        ratio = float(np.sqrt(squares / count))
        p_value = min(1.0, 2 * min(float(spread), repeats * max(1, runs - 1)))
        return Check(
            name=name,
            passed=p_value > FALSE_ALARM,
            value=ratio,
            p_value=p_value,
            detail=f"{count} draws, {ratio:.4f} of the calibrated standard deviation"
            + ("; two steps share noise" if repeats * runs <= FALSE_ALARM else ""),
        )

    def sensitivity(self) -> Check:
        """(b) With and without one more record, of the kinds that break a bound."""
        base = self._sum(self._features[:-1], self._labels[:-1])
        worst, kind = 0.0, "none"
        for label, features, labels in self._adversaries():
            moved = self._sum(
                np.concatenate([self._features[:-1], features]),
                np.concatenate([self._labels[:-1], labels]),
            )
            ratio = float(np.linalg.norm(moved - base)) / self._clip_norm
            if not ratio <= worst:  # also if it is not a number
                worst, kind = ratio, label
        return Check(
            name="one more record moves the sum by at most the clip norm",
            passed=worst <= 1 + _TOLERANCE,
            value=worst,
            p_value=None,
            detail=f"{worst:.4f} of the clip norm at worst ({kind})",
        )

    def _adversaries(self) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
        one, labels = self._features[-1:], self._labels
        others = [labels[i : i + 1] for i in np.unique(labels, axis=0, return_index=True)[1]]
        for label in others:
            yield "a record", one, label
            yield "a repetition", self._features[:1], label
            yield "one value everywhere", np.full_like(one, one.reshape(-1)[0]), label
            if np.issubdtype(one.dtype, np.floating):
                yield "zeros", np.zeros_like(one), label
                for scale in (1e-3, 1e2, 1e4):
                    yield f"scaled by {scale:g}", one * one.dtype.type(scale), label
                    yield f"scaled by {-scale:g}", one * one.dtype.type(-scale), label

    def participation(self, runs: int) -> Check:
        """(c) Read from the sums who took part, in single steps and over several."""
        name = "patients take part by Poisson sampling at the charged rate"
        alone = np.stack(
            [
                self._sum(self._features[i : i + 1], self._labels[i : i + 1])
                for i in range(_PATIENTS)
            ]
        )
        decode = np.linalg.pinv(alone)
        p_values = []
        trials, part = 0, 0
        for steps, rate in ((1, 1.0), (4, _SLOW)):
            sums = np.stack(
                [
                    self._sum(
                        self._features,
                        self._labels,
                        sample_rate=_RATE,
                        steps=steps,
                        learning_rate=rate,
                    )
                    for _ in range(runs)
                ]
            )
            raw = sums @ decode
            counts = np.rint(raw)
            off = float(np.abs(raw - counts).max())
            if not off < 0.3 or counts.min() < 0 or counts.max() > steps:  # noqa: PLR2004 (half-way to a wrong count)
                return Check(
                    name=name,
                    passed=False,
                    value=off,
                    p_value=0.0,
                    detail="a step is not a sum of its patients' clipped gradients, each once",
                )
            trials, part = trials + counts.size * steps, part + int(counts.sum())
            p_values += [
                _fit(counts.ravel(), stats.binom(steps, _RATE)),
                _fit(counts.sum(1), stats.binom(steps * _PATIENTS, _RATE)),
                _even(counts.sum(0), stats.binom(steps * runs, _RATE)),
            ]
        p_values.append(float(stats.binomtest(part, trials, _RATE).pvalue))
        p_value = min(1.0, len(p_values) * min(p_values))
        ratio = part / trials / _RATE
        return Check(
            name=name,
            passed=p_value > FALSE_ALARM,
            value=ratio,
            p_value=p_value,
            detail=f"{part} of {trials}: {ratio:.3f} of the charged rate; counts and batch sizes "
            f"against the binomial, least p {min(p_values):.2g} of {len(p_values)}",
        )

    def patients(self) -> Check:
        """(d) With and without a patient of many records, all alike or all different."""
        base = self._sum(self._features[:10], self._labels[:10])
        worst = 0.0
        for many in (2, 8):
            for alike in (True, False):
                rows = np.full(many, 10) if alike else np.arange(10, 10 + many)
                for scale in (1, 100):
                    extra = self._features[rows]
                    if np.issubdtype(extra.dtype, np.floating):
                        extra = extra * extra.dtype.type(scale)
                    moved = self._sum(
                        np.concatenate([self._features[:10], extra]),
                        np.concatenate([self._labels[:10], self._labels[rows]]),
                        np.concatenate([np.arange(10), np.full(many, 10)]),
                    )
                    ratio = float(np.linalg.norm(moved - base)) / self._clip_norm
                    worst = ratio if not ratio <= worst else worst
        return Check(
            name="a patient with many records moves the sum by at most the clip norm",
            passed=worst <= 1 + _TOLERANCE,
            value=worst,
            p_value=None,
            detail=f"{worst:.4f} of the clip norm at worst",
        )


def _fit(counts: NDArray[np.float64], law: Any) -> float:
    """Pearson's chi-square test of whole numbers against a law, tails joined to 5 or more."""
    low, high = law.ppf(5 / len(counts)), law.isf(5 / len(counts))
    if high <= low:
        return 1.0
    edges = np.arange(low, high)
    expected = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]])) * len(counts)
    found = np.bincount(np.searchsorted(edges, counts), minlength=len(expected))
    return float(stats.chisquare(found, expected).pvalue)


def _even(totals: NDArray[np.float64], law: Any) -> float:
    """Least exact two-sided p-value of one patient's number of steps, for all of them."""
    p = 2 * np.minimum(law.cdf(totals), law.sf(totals - 1))
    return min(1.0, float(p.min()) * len(totals))
