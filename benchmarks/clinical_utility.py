"""What privacy costs in use: AUC by epsilon on three clinical data sets, beside Opacus' defaults.

    [FEDWARD_DATA=...] python benchmarks/clinical_utility.py [--quick] [--json] [--figure FILE.svg]
    python benchmarks/clinical_utility.py --tune cancer|heart|icu2012

- cancer: scikit-learn's breast_cancer, one site, 455 rows for training, DP-SGD of 200 steps with
  sample rate .141 and clip norm 1. Features are scaled by the ranges that its description
  publishes, so that scaling costs nothing (`dp_utility.py` scales by the training rows, as the
  published figures do that it is held against). Opacus itself stands beside it.
- heart: four hospitals, all 920 patients, the settings of `heart_utility.py`.
- icu2012: 4,000 intensive-care stays over four sites (needs FEDWARD_DATA).

Heart and icu2012 are federated with "local" privacy: every site adds all of its noise. Delta is
1e-5, neighbours differ by one patient. Everything is trained by `fedward.client.training` and
priced by `calibrate`. "Opacus' defaults" are those of its README (SGD, learning rate .05, clip
norm 1, the last iterate) with batches of 64 and 20 epochs, at the same epsilon. Settings were
chosen by cross-validation within training rows of divisions that are not scored here (`--tune`).
"""

import argparse
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import heart_utility as heart
import icu2012
import numpy as np
import torch
from dp_logistic import (
    DELTA,
    OPACUS_BATCH,
    OPACUS_EPOCHS,
    OPACUS_RATE,
    Division,
    Sites,
    cancer,
    cancer_noise,
    guarantee,
    logistic,
    loss_of,
    opacus_cancer,
    scores,
    train_cancer,
)
from torch import nn

from fedward.client.training import TrainingPlan, train
from fedward.privacy.accounting import calibrate
from fedward.privacy.mechanisms import simulated_source
from fedward.tasks import datasets
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.task import Examples

HELD_OUT = 0.3
LEVELS = (0.25, 1.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a study would say.

    `momentum` is the server's. `average` is over the second half of the iterates. With `log_odds`
    the bias is that, of a published rate, and is not trained: it gets no noise, and gradients are
    of what tells patients apart from the first step on. `features` names those that are used,
    if not all: noise comes on each.
    """

    learning_rate: float
    clip_norm: float = 1.0
    sample_rate: float = 1.0
    rounds: int = 100
    momentum: float = 0.5
    average: bool = True
    log_odds: float | None = None
    features: tuple[str, ...] = ()


# Without momentum and averages, which are for many steps; a bias of a published rate (even odds
# of heart disease in whom it is suspected, 12% deaths in intensive care), so no noise on it.
_few_steps = partial(Setting, momentum=0.0, average=False)

# What heart disease is suspected from: who it is, the kind of pain, and the tests of exercise,
# fluoroscopy and scan, with the categories that stand out. Compared with five other such lists.
HEART_FEW = (
    "age",
    "sex",
    "chest_pain = asymptomatic",
    "chest_pain = atypical angina",
    "max_heart_rate",
    "exercise_angina",
    "st_depression",
    "st_slope = upsloping",
    "st_slope = flat",
    "vessels_fluoroscopy",
    "thallium_scan = normal",
    "thallium_scan = reversible defect",
)

# By data set and epsilon, from `--tune`; heart's are `heart_utility.py`'s.
SETTINGS: dict[str, dict[float | None, Setting]] = {
    "heart": {
        epsilon: Setting(s.learning_rate, s.clip_norm, s.sample_rate, s.rounds, momentum=0.0)
        for (model, epsilon), s in heart.SETTINGS.items()
        if model == "logistic"
    }
    # At so little, few steps of everybody are the best, and `heart_utility` has not those.
    | {0.25: _few_steps(2.0, rounds=2, log_odds=0.0, features=HEART_FEW)},
    "icu2012": {
        None: Setting(8.0),
        8.0: Setting(4.0),  # 4 and 8 were not tuned: between the choices for 1 and for none
        4.0: Setting(4.0),
        1.0: Setting(4.0, rounds=30, momentum=0.0, log_odds=-2.0, features=icu2012.MORE),
        0.25: _few_steps(8.0, clip_norm=0.7, rounds=2, log_odds=-2.0, features=icu2012.FEW),
    },
}
CANCER_RATES: dict[float | None, float] = {None: 2.0, 8.0: 2.0, 3.0: 2.0, 1.0: 1.0, 0.5: 0.5}

# AUC of the reference runs' "local" rows.
BARS = {
    "heart": {"0.25": 0.850, "1": 0.877, "4": 0.888, "8": 0.889},
    "icu2012": {"0.25": 0.734, "1": 0.788, "4": 0.818},
}


def name_of(epsilon: float | None) -> str:
    """As in tables and JSON."""
    return "none" if epsilon is None else f"{epsilon:g}"


# ---- one site: breast cancer


def measure_cancer(*, seeds: int, opacus_seeds: int) -> list[dict[str, object]]:
    """Accuracy and AUC by epsilon, over divisions and seeds."""
    rows: list[dict[str, object]] = []
    for epsilon, rate in CANCER_RATES.items():
        noise = cancer_noise(epsilon)
        found, theirs = [], []
        for seed in range(seeds):
            training, test = cancer(seed)
            found.append(scores(train_cancer(training[0], rate=rate, noise=noise, seed=seed), test))
            if epsilon is not None and seed < opacus_seeds:
                theirs.append(scores(opacus_cancer(training[0], epsilon=epsilon, seed=seed), test))
        rows.append(
            _row("cancer", epsilon, [auc for _, auc in found], noise, [auc for _, auc in theirs])
            | {"accuracy": float(np.mean([accuracy for accuracy, _ in found]))}
            | {"opacus_accuracy": float(np.mean([a for a, _ in theirs])) if theirs else None}
        )
        progress(rows[-1])
    return rows


# ---- four sites: heart and icu2012


def divisions_of(name: str, seeds: Sequence[int]) -> tuple[list[Division], list[float]]:
    """Training and held-out patients by site, and each site's public number of the former."""
    if name == "heart":
        sizes = [(1 - HELD_OUT) * size for size in datasets.partitions("heart-disease").values()]
        return [heart.hospitals(seed) for seed in seeds], sizes
    data = icu2012.load(Path(os.environ["FEDWARD_DATA"]) / "icu2012")
    found = [icu2012.divide(*data, held_out=HELD_OUT, seed=seed) for seed in seeds]
    return found, [(1 - HELD_OUT) * 4000 / icu2012.NUM_SITES] * icu2012.NUM_SITES


def noise_of(epsilon: float | None, setting: Setting) -> float | None:
    """The noise for which a site's whole run costs `epsilon`."""
    if epsilon is None:
        return None
    return calibrate(
        epsilon=epsilon, delta=DELTA, sample_rate=setting.sample_rate, steps=setting.rounds
    )


def opacus_setting(size: float) -> Setting:
    """Opacus' defaults at a site of this size; one step a round."""
    rate = min(1.0, OPACUS_BATCH / size)
    rounds = round(OPACUS_EPOCHS / rate)
    return Setting(OPACUS_RATE, 1.0, rate, rounds, momentum=0.0, average=False)


def federate(
    sites: Sites,
    sizes: Sequence[float],
    *,
    setting: Setting,
    noise: float | None,
    seed: int,
) -> nn.Module:
    """One step a round at every site, summed in proportion to public sizes."""
    sites = _columns(sites, setting.features)
    plans = [
        TrainingPlan(
            learning_rate=setting.learning_rate,
            steps=1,
            sample_rate=setting.sample_rate,
            expected_batch_size=setting.sample_rate * size,
            guarantee=guarantee(setting.clip_norm, noise),
        )
        for size in sizes
    ]
    sources = [simulated_source("dp-utility", seed, index) for index in range(len(sites))]
    model = logistic(sites[0].features.shape[1])
    if setting.log_odds is not None:
        nn.init.constant_(model.bias.requires_grad_(False), setting.log_odds)
    parameters = to_vector(model)
    velocity, mean = np.zeros(len(parameters)), np.zeros(len(parameters))
    for number in range(setting.rounds):
        total = np.zeros(len(parameters))
        for examples, size, plan, source in zip(sites, sizes, plans, sources, strict=True):
            from_vector(model, parameters)
            total += size * train(model, loss_of, examples, plan=plan, noise=source).update
        velocity = setting.momentum * velocity + total / sum(sizes)
        parameters = (parameters + velocity).astype(np.float32)
        if number >= setting.rounds // 2:
            mean += parameters / (setting.rounds - setting.rounds // 2)
    from_vector(model, mean.astype(np.float32) if setting.average else parameters)
    return model


def measure(name: str, *, levels: Sequence[float | None], seeds: int) -> list[dict[str, object]]:
    """AUC by epsilon, over divisions."""
    divisions, sizes = divisions_of(name, range(seeds))
    divisions = [([_float(e) for e in t], h) for t, h in divisions]
    theirs_setting = opacus_setting(float(np.mean(sizes)))
    rows = []
    for epsilon in levels:
        setting = SETTINGS[name][epsilon]
        noise = noise_of(epsilon, setting)
        found, theirs = [], []
        for seed, (training, out) in enumerate(divisions):
            model = federate(training, sizes, setting=setting, noise=noise, seed=seed)
            found.append(scores(model, _columns(out, setting.features))[1])
            if epsilon is not None:
                their_noise = noise_of(epsilon, theirs_setting)
                model = federate(
                    training, sizes, setting=theirs_setting, noise=their_noise, seed=seed
                )
                theirs.append(scores(model, out)[1])
        rows.append(_row(name, epsilon, found, noise, theirs))
        progress(rows[-1])
    return rows


def _columns(sites: Sites, features: Sequence[str]) -> Sites:
    """Those features; all if none is named."""
    if not features:
        return sites
    known = icu2012.NAMES if features[0] in icu2012.NAMES else heart.TASK.feature_names
    index = [known.index(name) for name in features]
    return [Examples(e.features[:, index], e.labels, e.units) for e in sites]


def _float(examples: Examples) -> Examples:
    return Examples(examples.features, examples.labels.astype(np.float32), examples.units)


def _row(
    name: str,
    epsilon: float | None,
    found: Sequence[float],
    noise: float | None,
    theirs: Sequence[float],
) -> dict[str, object]:
    return {
        "data": name,
        "epsilon": epsilon,
        "delta": None if epsilon is None else DELTA,
        "noise_multiplier": noise,
        "auroc": float(np.mean(found)),
        "standard_error": float(np.std(found, ddof=1) / np.sqrt(len(found))),
        "divisions": len(found),
        # On the divisions that Opacus had too: on cancer, where Opacus itself runs, they are fewer.
        "auroc_there": float(np.mean(found[: len(theirs)])) if theirs else None,
        "opacus_auroc": float(np.mean(theirs)) if theirs else None,
        "opacus_divisions": len(theirs),
    }


def progress(row: Mapping[str, object]) -> None:
    """One line as a result comes."""
    print(json.dumps(row), file=sys.stderr, flush=True)


# ---- tuning, bars, picture


def _candidates(name: str, epsilon: float | None) -> Iterator[Setting]:
    little = epsilon is not None and epsilon < 1
    rounds = (5, 10, 20, 40) if little else (30, 100)
    for rate, length in itertools.product((1.0, 2.0, 4.0, 8.0), rounds):
        yield Setting(rate, rounds=length)
    if name == "icu2012" and epsilon is not None:
        for rate, length, momentum in ((4.0, 30, 0.0), (8.0, 30, 0.0), (4.0, 60, 0.5)):
            for features in ((), icu2012.FEW, icu2012.MORE):
                yield Setting(
                    rate, rounds=length, momentum=momentum, log_odds=-2.0, features=features
                )
    if little:
        log_odds, few = (0.0, HEART_FEW) if name == "heart" else (-2.0, icu2012.FEW)
        for rate, clip, length in itertools.product((2.0, 8.0), (0.7, 1.0, 1.4), (1, 2, 4)):
            for features in ((), few):
                yield _few_steps(
                    rate, clip_norm=clip, rounds=length, log_odds=log_odds, features=features
                )


def tune(name: str, *, seeds: Sequence[int]) -> Iterator[tuple[float | None, float, object]]:
    """Cross-validated AUC of candidates, on training rows of divisions that are never scored.

    Two thirds of the rows train, with two thirds of the noise: candidates are compared at the
    signal-to-noise ratio of the whole.
    """
    share = 2 / 3
    if name == "cancer":
        for epsilon, rate in itertools.product(CANCER_RATES, (0.12, 0.25, 0.5, 1.0, 2.0)):
            noise = cancer_noise(epsilon)
            found = [
                scores(
                    train_cancer(fit[0], rate=rate, noise=noise, seed=seed, share=share), validate
                )[1]
                for seed in seeds
                for fit, validate in heart.folds(cancer(seed)[0], seed)
            ]
            yield epsilon, float(np.mean(found)), rate
        return
    divisions, sizes = divisions_of(name, seeds)
    sizes = [share * size for size in sizes]
    for epsilon in (None, *LEVELS):
        for setting in _candidates(name, epsilon):
            noise = noise_of(epsilon, setting)
            noise = None if noise is None else share * noise
            found = [
                scores(
                    federate(
                        [_float(e) for e in fit], sizes, setting=setting, noise=noise, seed=seed
                    ),
                    _columns(validate, setting.features),
                )[1]
                for seed, (training, _) in zip(seeds, divisions, strict=True)
                for fit, validate in heart.folds(training, seed)
            ]
            yield epsilon, float(np.mean(found)), setting


def bars_of(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Every bar, held or missed."""
    bars: list[dict[str, object]] = []

    def bar(name: str, value: object, limit: float) -> None:
        figure = float(str(value))
        bars.append({"name": name, "value": figure, "bar": limit, "holds": figure >= limit})

    for row in rows:
        data, epsilon = str(row["data"]), row["epsilon"]
        level = name_of(epsilon if isinstance(epsilon, float) else None)
        if level in BARS.get(data, {}):
            bar(f"{data}, epsilon {level}: AUC", row["auroc"], BARS[data][level])
        if row["opacus_auroc"] is not None:
            theirs = float(str(row["opacus_auroc"]))
            bar(f"{data}, epsilon {level}: AUC over Opacus' defaults", row["auroc_there"], theirs)
    return bars


def draw(rows: Sequence[Mapping[str, object]], file: Path) -> None:
    """AUC over epsilon, one panel a data set."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "fedward"  # the same picture is the same file
    from matplotlib import pyplot

    names = list(dict.fromkeys(str(row["data"]) for row in rows))
    titles = {
        "cancer": "breast cancer, one site",
        "heart": "heart disease, 4 hospitals, local",
        "icu2012": "intensive care, 4 sites, local",
    }
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        private = sorted(
            (
                float(str(r["epsilon"])),
                float(str(r["auroc"])),
                float(str(r["standard_error"])),
                float(str(r["opacus_auroc"])),
            )
            for r in rows
            if r["data"] == name and r["epsilon"] is not None
        )
        epsilons, ours, errors, theirs = zip(*private, strict=True)
        axis.errorbar(epsilons, ours, yerr=errors, marker="o", capsize=2, label="Fedward")
        axis.plot(epsilons, theirs, marker="s", linestyle=":", label="Opacus' defaults")
        for row in rows:
            if row["data"] == name and row["epsilon"] is None:
                axis.axhline(
                    float(str(row["auroc"])),
                    color="grey",
                    linestyle="--",
                    linewidth=1,
                    label="no privacy",
                )
        axis.set_xscale("log")
        axis.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axis.minorticks_off()
        axis.set(title=titles[name], xlabel="epsilon (delta 1e-5, per patient)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("AUC on held-out patients")
    axes[0][-1].legend(loc="center right", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def measured(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The rows that were asked for."""
    seeds, opacus_seeds = (3, 1) if arguments.quick else (arguments.divisions, 3)
    rows: list[dict[str, object]] = []
    wanted = arguments.data or ["cancer", "heart", "icu2012"]
    if "cancer" in wanted:
        rows += measure_cancer(seeds=seeds, opacus_seeds=opacus_seeds)
    for name in ("heart", "icu2012"):
        if name == "icu2012" and "FEDWARD_DATA" not in os.environ:
            print("icu2012 needs FEDWARD_DATA, and is left out", file=sys.stderr)
        elif name in wanted:
            levels: tuple[float | None, ...] = (None, *LEVELS)
            if arguments.quick or arguments.epsilon:
                levels = (arguments.epsilon or 1.0,)
            rows += measure(name, levels=levels, seeds=seeds)
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="few divisions: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--figure", type=Path, help="write the picture (SVG or PNG) here")
    parser.add_argument("--tune", choices=("cancer", "heart", "icu2012"))
    parser.add_argument("--data", choices=("cancer", "heart", "icu2012"), action="append")
    parser.add_argument("--divisions", type=int, default=12)
    parser.add_argument(
        "--epsilon", type=float, choices=LEVELS, help="only this, of heart and icu2012"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Opacus warns of its own loader and hooks
    if arguments.tune:
        for epsilon, score, setting in tune(arguments.tune, seeds=(10_000, 10_001)):
            print(f"{arguments.tune} epsilon {name_of(epsilon)}: {score:.4f} {setting}", flush=True)
        return
    started = time.perf_counter()
    rows = measured(arguments)
    bars = bars_of(rows)
    if arguments.figure:
        draw(rows, arguments.figure)
    if arguments.json:
        seconds = time.perf_counter() - started
        print(
            json.dumps(
                {"benchmark": "clinical_utility", "rows": rows, "seconds": seconds, "bars": bars}
            )
        )
        return
    for bar in bars:
        verdict = "holds " if bar["holds"] else "MISSED"
        print(f"{verdict} {bar['name']}: {bar['value']:.4f} ({bar['bar']:.4f})")


if __name__ == "__main__":
    main()
