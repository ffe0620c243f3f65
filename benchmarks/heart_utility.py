"""What privacy costs on real hospitals: AUC of heart disease by epsilon, federated over four.

70/30 within each hospital by a keyed hash of the patient, mean over 20 divisions, on the held-out
patients of all hospitals together. "Local" privacy: every hospital adds all of its noise itself,
so that the guarantee holds against the coordinator too; delta is 1e-5, neighbours differ by one
patient, priced by privacy loss distributions. Hospitals train with the project's own trainer, one
step a round, and the model is the mean of the second half of the iterates.

Settings were chosen by three-fold cross-validation within training rows (`--tune`), on divisions
of other seeds; no held-out row of its own division was scored. The reference is scikit-learn's
logistic regression on the pooled training rows, without privacy.

    python benchmarks/heart_utility.py [--quick] [--json] [--tune logistic|mlp]
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
import torch
from dp_accounting import pld
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedward.client.sources import split
from fedward.client.training import NotPrivate, Private, TrainingPlan, train
from fedward.tasks import datasets
from fedward.tasks.heart_disease import HEART_DISEASE as TASK
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.task import Examples

DELTA = 1e-5
HELD_OUT = 0.3
SIZES = datasets.partitions("heart-disease")
BARS = {"none": 0.89, "4": 0.88, "1": 0.867}
LEVELS: tuple[float | None, ...] = (None, 8.0, 4.0, 1.0, 0.25)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a study would say."""

    learning_rate: float
    clip_norm: float = 1.0
    sample_rate: float = 0.3
    rounds: int = 100


# By model and epsilon, from `--tune`.
SETTINGS: dict[tuple[str, float | None], Setting] = {
    ("logistic", None): Setting(0.5),
    ("logistic", 8.0): Setting(1.0),
    ("logistic", 4.0): Setting(1.0),
    ("logistic", 1.0): Setting(1.0, clip_norm=0.5),
    ("logistic", 0.25): Setting(0.25, clip_norm=0.5, sample_rate=1.0, rounds=10),
    ("mlp", None): Setting(1.0),
    ("mlp", 8.0): Setting(2.0, clip_norm=0.5),
    ("mlp", 4.0): Setting(2.0, clip_norm=0.5),
    ("mlp", 1.0): Setting(1.0, clip_norm=0.5),
    ("mlp", 0.25): Setting(2.0, clip_norm=0.5, sample_rate=1.0, rounds=10),
}


class Draws:
    """Repeatable randomness of a benchmark; not private."""

    private = False

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float32]:
        """Normal draws."""
        return (self._rng.standard_normal(size) * std).astype(np.float32)

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Uniform draws."""
        return self._rng.random(size)


def noise_multiplier(epsilon: float, setting: Setting) -> float:
    """The noise for which the whole run costs `epsilon`."""
    return _calibrated(epsilon, setting.sample_rate, setting.rounds)


@functools.cache
def _calibrated(epsilon: float, sample_rate: float, rounds: int) -> float:
    """By dp-accounting's own PLD and search, independently of the project's."""

    def event(noise: float) -> dp_accounting.DpEvent:
        step = dp_accounting.GaussianDpEvent(noise)
        if sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(sample_rate, step)
        return dp_accounting.SelfComposedDpEvent(step, rounds)

    return float(
        dp_accounting.calibrate_dp_mechanism(
            lambda: pld.PLDAccountant(
                dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
                value_discretization_interval=1e-3,
            ),
            event,
            epsilon,
            DELTA,
            tol=1e-3,
        )
    )


def hospitals(seed: int) -> tuple[list[Examples], list[Examples]]:
    """Each hospital's training and held-out examples."""
    key = f"heart-utility, division {seed:08d}".encode()
    both = [
        split(datasets.load("heart-disease", partition=name), held_out=HELD_OUT, key=key)
        for name in SIZES
    ]
    return (
        [TASK.prepare(training, None) for training, _ in both],
        [TASK.prepare(held_out, None) for _, held_out in both],
    )


def federate(
    sites: Sequence[Examples],
    sizes: Sequence[float],
    *,
    model_name: str,
    setting: Setting,
    noise: float | None,
    seed: int,
) -> NDArray[np.float32]:
    """Train over hospitals; returns the parameters.

    Args:
        sites: Training examples of each.
        sizes: Public number of training patients of each.
        model_name: Of the task's models.
        setting: Learning rate and the rest.
        noise: Noise multiplier, or None for no privacy.
        seed: Of sampling and noise.
    """
    guarantee = (
        NotPrivate()
        if noise is None
        else Private(clip_norm=setting.clip_norm, noise_multiplier=noise)
    )
    plans = [
        TrainingPlan(
            learning_rate=setting.learning_rate,
            steps=1,
            sample_rate=setting.sample_rate,
            expected_batch_size=setting.sample_rate * size,
            guarantee=guarantee,
        )
        for size in sizes
    ]
    sources = [Draws(seed, index) for index in range(len(sites))]
    model = TASK.model(model_name)
    parameters = to_vector(model)
    mean, counted = np.zeros(len(parameters)), 0
    for round_number in range(1, setting.rounds + 1):
        total = np.zeros(len(parameters))
        for examples, size, plan, source in zip(sites, sizes, plans, sources, strict=True):
            from_vector(model, parameters)
            total += size * train(model, TASK.loss, examples, plan=plan, noise=source).update
        parameters = (parameters + total / sum(sizes)).astype(np.float32)
        if round_number > setting.rounds // 2:
            mean, counted = mean + parameters, counted + 1
    return (mean / counted).astype(np.float32)


def auroc(model_name: str, parameters: NDArray[np.float32], sites: Sequence[Examples]) -> float:
    """Exact AUC over the patients of all these hospitals together."""
    model = TASK.model(model_name)
    from_vector(model, parameters)
    features = np.concatenate([e.features for e in sites])
    with torch.no_grad():
        outputs = model(torch.from_numpy(features)).numpy()[:, 0]
    return float(roc_auc_score(np.concatenate([e.labels for e in sites]), outputs))


def pooled_reference(training: Sequence[Examples], held_out: Sequence[Examples]) -> float:
    """scikit-learn on the pooled rows: what no hospital would allow."""
    model = LogisticRegression(max_iter=1000).fit(
        np.concatenate([e.features for e in training]), np.concatenate([e.labels for e in training])
    )
    scores = model.decision_function(np.concatenate([e.features for e in held_out]))
    return float(roc_auc_score(np.concatenate([e.labels for e in held_out]), scores))


def level_name(epsilon: float | None) -> str:
    """As in tables and JSON."""
    return "none" if epsilon is None else f"{epsilon:g}"


def by_epsilon(
    models: Sequence[str], levels: Sequence[float | None], seeds: Sequence[int]
) -> tuple[list[dict[str, object]], list[float]]:
    """AUC of each model and epsilon, and the reference's by seed."""
    divisions = [hospitals(seed) for seed in seeds]
    reference = [pooled_reference(*division) for division in divisions]
    sizes = [(1 - HELD_OUT) * size for size in SIZES.values()]
    results: list[dict[str, object]] = []
    for name, epsilon in itertools.product(models, levels):
        setting = SETTINGS[name, epsilon]
        noise = None if epsilon is None else noise_multiplier(epsilon, setting)
        found = [
            auroc(
                name,
                federate(training, sizes, model_name=name, setting=setting, noise=noise, seed=seed),
                held_out,
            )
            for seed, (training, held_out) in zip(seeds, divisions, strict=True)
        ]
        results.append(
            {
                "model": name,
                "epsilon": epsilon,
                "delta": None if epsilon is None else DELTA,
                "noise_multiplier": noise,
                "learning_rate": setting.learning_rate,
                "clip_norm": None if epsilon is None else setting.clip_norm,
                "sample_rate": setting.sample_rate,
                "rounds": setting.rounds,
                "auroc": float(np.mean(found)),
                "standard_error": float(np.std(found, ddof=1) / np.sqrt(len(found))),
                "ratio": float(np.mean(found) / np.mean(reference)),
            }
        )
        progress(results[-1])
    return results, reference


def progress(row: dict[str, object]) -> None:
    """One line as a result comes."""
    epsilon = row["epsilon"]
    print(
        f"{row['model']:9} epsilon {'none' if epsilon is None else epsilon!s:5} "
        f"AUC {row['auroc']:.4f} ± {row['standard_error']:.4f} "
        f"({row['ratio']:.4f} of pooled scikit-learn)",
        file=sys.stderr,
    )


def leave_one_out(model_name: str) -> dict[str, float]:
    """AUC on all patients of a hospital that took no part, without privacy."""
    examples = {
        name: TASK.prepare(datasets.load("heart-disease", partition=name), None) for name in SIZES
    }
    found = {}
    for left in SIZES:
        others = [name for name in SIZES if name != left]
        parameters = federate(
            [examples[name] for name in others],
            [SIZES[name] for name in others],
            model_name=model_name,
            setting=SETTINGS[model_name, None],
            noise=None,
            seed=0,
        )
        found[left] = auroc(model_name, parameters, [examples[left]])
    return found


def folds(training: Sequence[Examples], seed: int) -> Iterator[tuple[list[Examples], ...]]:
    """Three-fold cross-validation within each hospital's training rows."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(len(e)) % 3 for e in training]
    for fold in range(3):
        yield (
            [e.take(np.flatnonzero(p != fold)) for e, p in zip(training, parts, strict=True)],
            [e.take(np.flatnonzero(p == fold)) for e, p in zip(training, parts, strict=True)],
        )


def tune(model_name: str, epsilon: float | None, *, num_seeds: int) -> list[tuple[float, Setting]]:
    """Cross-validated AUC of candidate settings, best first.

    A fold trains on two thirds of the patients, so it gets two thirds of the noise: what is
    compared is settings at the signal-to-noise ratio of the whole.
    """
    share = 2 / 3
    sizes = [share * (1 - HELD_OUT) * size for size in SIZES.values()]
    rates = (0.1, 0.25, 0.5, 1.0, 2.0)
    shapes = [(0.3, 100)] if epsilon is None or epsilon >= 1 else [(0.3, 100), (1.0, 10)]
    found = []
    clips = (1.0,) if epsilon is None else (0.5, 1.0)
    for learning_rate, clip, (sample_rate, rounds) in itertools.product(rates, clips, shapes):
        setting = Setting(learning_rate, clip, sample_rate, rounds)
        noise = None if epsilon is None else share * noise_multiplier(epsilon, setting)
        scores = [
            auroc(
                model_name,
                federate(fit, sizes, model_name=model_name, setting=setting, noise=noise, seed=s),
                validate,
            )
            for s in range(10_000, 10_000 + num_seeds)
            for fit, validate in folds(hospitals(s)[0], s)
        ]
        found.append((float(np.mean(scores)), setting))
    return sorted(found, key=lambda pair: -pair[0])


def bars_of(results: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The issue's bars, each met or not."""
    bars = []
    for row in results:
        epsilon = row["epsilon"]
        name = level_name(epsilon if isinstance(epsilon, float) else None)
        if row["model"] == "logistic" and name in BARS:
            bars.append(
                {
                    "name": f"federated logistic AUC, epsilon {name}",
                    "value": row["auroc"],
                    "bar": BARS[name],
                    "holds": bool(float(str(row["auroc"])) >= BARS[name]),
                }
            )
    return bars


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="only what has a bar, 10 divisions: under 60 s"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--tune", choices=TASK.models, help="cross-validate settings instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.tune:
        for epsilon in LEVELS:
            for score, setting in tune(arguments.tune, epsilon, num_seeds=3):
                line = f"{arguments.tune} epsilon {level_name(epsilon)}: {score:.4f} {setting}"
                print(line, flush=True)
        return
    started = time.perf_counter()
    models = ("logistic",) if arguments.quick else TASK.models
    levels = (None, 4.0, 1.0) if arguments.quick else LEVELS
    divisions = 10 if arguments.quick else 20
    results, reference = by_epsilon(models, levels, range(divisions))
    left_out = {} if arguments.quick else {name: leave_one_out(name) for name in models}
    outcome = {
        "benchmark": "heart_utility",
        "divisions": divisions,
        "reference": {"name": "pooled scikit-learn", "auroc": float(np.mean(reference))},
        "results": results,
        "leave_one_hospital_out": left_out,
        "seconds": time.perf_counter() - started,
        "bars": bars_of(results),
    }
    if arguments.json:
        print(json.dumps(outcome))
        return
    print(f"pooled scikit-learn, no privacy: AUC {np.mean(reference):.4f}")
    for name, found in left_out.items():
        print(f"{name}, hospital left out:", *(f"{h} {v:.3f}" for h, v in found.items()))
    for bar in outcome["bars"]:
        print(f"{bar['name']}: {bar['value']:.4f}, bar {bar['bar']}, holds: {bar['holds']}")


if __name__ == "__main__":
    main()
