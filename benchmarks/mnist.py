"""Opacus' MNIST table, reproduced with Fedward's trainer, and what the same epsilon can buy.

    FEDWARD_DATA=... python benchmarks/mnist.py [--quick] [--json] [--epsilon 1.16]
                                                [--settings published] [--seeds N] [--first-seed N]

Opacus' `examples/mnist_README.md` publishes, for its convolutional network and delta 1e-5, the
accuracy of three settings over ten runs. "published" runs its model, sampling rate, noise, clip
norm, learning rate and number of steps through `fedward.client.training` in book-keeping mode.
"fedward" has the same network and, by the same accountant (PLD), no larger an epsilon, in larger
batches with a falling learning rate and an average of the iterates, all of which cost nothing.
Its settings are one guess a level, not the best of many on the test digits. `--settings opacus`
runs the published settings through Opacus itself, as it is installed here, from the same initial
weights: what it reaches today is what "published" is to be held against.

Needs the four IDX files in `$FEDWARD_DATA/mnist`. One thread.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fedward.client.training import Private, TrainingPlan, train
from fedward.privacy.accounting import PrivacySpent, calibrate, dp_sgd_event, privacy_spent
from fedward.privacy.mechanisms import simulated_source
from fedward.tasks.task import Examples

DELTA = 1e-5
SIZE = 60_000
MEAN, SPREAD = 0.1307, 0.3081  # the constants of Opacus' example


@dataclass(frozen=True, slots=True)
class Published:
    """A row of Opacus' table: its command, and the mean and spread of ten runs, in percent."""

    name: str
    epochs: int
    learning_rate: float
    noise_multiplier: float
    clip_norm: float
    accuracy: float
    spread: float
    sample_rate: float = 0.004

    @property
    def steps(self) -> int:
        """As Opacus counts: an epoch is 1 / sample_rate steps."""
        return round(self.epochs / self.sample_rate)


@dataclass(frozen=True, slots=True)
class Ours:
    """What is done instead, at the same epsilon."""

    sample_rate: float
    steps: int
    learning_rate: float
    clip_norm: float


PUBLISHED = (
    Published("1.16", 15, 0.25, 1.3, 1.5, 94.63, 0.34),
    Published("2.91", 60, 0.15, 1.1, 1.0, 96.78, 0.21),
    Published("6.86", 45, 0.25, 0.7, 1.5, 97.09, 0.17),
)
OURS = {
    "1.16": Ours(sample_rate=0.03, steps=500, learning_rate=4.0, clip_norm=0.5),
    "2.91": Ours(sample_rate=0.03, steps=2000, learning_rate=4.0, clip_norm=0.5),
    "6.86": Ours(sample_rate=0.03, steps=1500, learning_rate=4.0, clip_norm=0.5),
}


class SampleConvNet(nn.Module):
    """The network of Opacus' example, 26,010 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, 4, 2)
        self.fc1, self.fc2 = nn.Linear(512, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (rows, 10) for pictures of shape (rows, 1, 28, 28)."""
        x = functional.max_pool2d(torch.relu(self.conv1(x)), 2, 1)
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2, 1)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def digits(folder: Path, part: str) -> Examples:
    """Pictures and labels of "train" or "t10k", each digit a patient of its own."""
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    features = ((images / np.float32(255) - MEAN) / SPREAD).astype(np.float32)
    return Examples(features, labels.astype(np.int64), np.arange(len(labels)))


def _idx(file: Path, *, header: int) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(file.read_bytes())[header:], dtype=np.uint8)


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, one value an example."""
    return functional.cross_entropy(outputs, labels, reduction="none")


def plan_of(setting: Published | Ours, *, noise_multiplier: float) -> TrainingPlan:
    """The whole run as one round at one site."""
    ours = isinstance(setting, Ours)
    return TrainingPlan(
        learning_rate=setting.learning_rate,
        steps=setting.steps,
        sample_rate=setting.sample_rate,
        expected_batch_size=setting.sample_rate * SIZE,
        guarantee=Private(clip_norm=setting.clip_norm, noise_multiplier=noise_multiplier),
        mode="book-keeping",
        schedule="linear" if ours else "constant",
        averaging="ema" if ours else "last",
        ema_decay=0.98,
    )


def run(training: Examples, test: Examples, plan: TrainingPlan, *, seed: int) -> float:
    """Accuracy in percent on the test digits; sampling and noise are drawn from the seed."""
    torch.manual_seed(seed)
    model = SampleConvNet()
    train(model, loss_of, training, plan=plan, noise=simulated_source("mnist", seed))
    return accuracy_of(model, test)


def run_opacus(training: Examples, test: Examples, row: Published, *, seed: int) -> float:
    """The same by Opacus: its engine, loader and hooks, as its example has them."""
    torch.manual_seed(seed)
    model: nn.Module = SampleConvNet()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=row.learning_rate)
    digits = TensorDataset(torch.from_numpy(training.features), torch.from_numpy(training.labels))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(digits, batch_size=round(row.sample_rate * SIZE)),
        noise_multiplier=row.noise_multiplier,
        max_grad_norm=row.clip_norm,
    )
    for _ in range(row.epochs):
        for features, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
    return accuracy_of(model, test)


def accuracy_of(model: nn.Module, test: Examples) -> float:
    """In percent."""
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(test.features)).argmax(1).numpy()
    return 100 * float(np.mean(found == test.labels))


def measure(
    row: Published, training: Examples, test: Examples, *, settings: list[str], seeds: range
) -> list[dict[str, object]]:
    """The wanted ways of spending one row's epsilon."""
    event = dp_sgd_event(
        noise_multiplier=row.noise_multiplier, sample_rate=row.sample_rate, steps=row.steps
    )
    published = privacy_spent(event, delta=DELTA, unit="record")
    ours = OURS[row.name]
    noise = calibrate(
        epsilon=published.epsilon, delta=DELTA, sample_rate=ours.sample_rate, steps=ours.steps
    )
    event = dp_sgd_event(noise_multiplier=noise, sample_rate=ours.sample_rate, steps=ours.steps)
    spent = privacy_spent(event, delta=DELTA, unit="record")
    if spent.epsilon > published.epsilon + 1e-3:
        raise RuntimeError(f"calibrated to {published.epsilon}, and it costs {spent.epsilon}")
    ways: dict[str, tuple[Published | Ours, float, PrivacySpent]] = {
        "published": (row, row.noise_multiplier, published),
        "fedward": (ours, noise, spent),
        "opacus": (row, row.noise_multiplier, published),
    }
    return [
        _row(
            who,
            row=row,
            setting=setting,
            noise_multiplier=noise_multiplier,
            spent=paid,
            data=(training, test),
            seeds=seeds,
        )
        for who, (setting, noise_multiplier, paid) in ways.items()
        if who in settings
    ]


def _row(
    who: str,
    *,
    row: Published,
    setting: Published | Ours,
    noise_multiplier: float,
    spent: PrivacySpent,
    data: tuple[Examples, Examples],
    seeds: range,
) -> dict[str, object]:
    started = time.process_time()
    plan = plan_of(setting, noise_multiplier=noise_multiplier)
    found = []
    for seed in seeds:
        if who == "opacus":
            found.append(run_opacus(*data, row, seed=seed))
        else:
            found.append(run(*data, plan, seed=seed))
        print(f"{row.name} {who:9} seed {seed}: {found[-1]:.2f}", file=sys.stderr, flush=True)
    value: dict[str, object] = {
        "level": row.name,
        "settings": who,
        "privacy": spent.to_json(),
        "sample_rate": setting.sample_rate,
        "steps": setting.steps,
        "learning_rate": setting.learning_rate,
        "clip_norm": setting.clip_norm,
        "noise_multiplier": noise_multiplier,
        "accuracy": statistics.mean(found),
        "deviation": statistics.stdev(found) if len(found) > 1 else None,
        "seeds": dict(zip(map(str, seeds), found, strict=True)),
        "opacus": row.accuracy,
        "opacus_spread": row.spread,
        "ratio": statistics.mean(found) / row.accuracy,
        "cpu_seconds": time.process_time() - started,
    }
    print(
        f"{row.name} {who:9} {spent}: accuracy {value['accuracy']:.2f} in {len(seeds)} runs "
        f"(Opacus {row.accuracy} ± {row.spread}), {value['cpu_seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return value


def bars_of(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Reproduced within Opacus' spread or above, and then above what was reproduced."""
    bars: list[dict[str, object]] = []
    reproduced: dict[object, float] = {}
    for row in rows:
        accuracy = float(str(row["accuracy"]))
        if row["settings"] == "opacus":  # a reference, of which nothing is asked
            continue
        if row["settings"] == "published":
            reproduced[row["level"]] = accuracy
            bar = float(str(row["opacus"])) - float(str(row["opacus_spread"]))
            name = f"epsilon {row['level']}: Opacus' settings, its mean less its spread"
        else:
            bar = max(float(str(row["opacus"])), reproduced.get(row["level"], 0.0))
            name = f"epsilon {row['level']}: better at no larger epsilon"
        bars.append({"name": name, "value": accuracy, "bar": bar, "holds": accuracy >= bar})
    return bars


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="the first level, one seed")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--settings", choices=["published", "fedward", "opacus"], action="append")
    parser.add_argument("--epsilon", choices=[row.name for row in PUBLISHED], action="append")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("FEDWARD_DATA", "")) / "mnist"
    if "FEDWARD_DATA" not in os.environ or not folder.is_dir():
        sys.exit("set FEDWARD_DATA to a folder with mnist/*.gz, the digits as IDX files")
    torch.set_num_threads(1)
    training, test = digits(folder, "train"), digits(folder, "t10k")
    wanted = arguments.epsilon or [row.name for row in PUBLISHED[: 1 if arguments.quick else 3]]
    settings = arguments.settings or ["published", "fedward"]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.quick:
        seeds = seeds[:1]
    rows = []
    for row in PUBLISHED:
        if row.name in wanted:
            rows += measure(row, training, test, settings=settings, seeds=seeds)
    bars = bars_of(rows)
    if arguments.json:
        print(json.dumps({"benchmark": "mnist", "seeds": [*seeds], "rows": rows, "bars": bars}))
        return
    for bar in bars:
        print(
            f"{'holds ' if bar['holds'] else 'MISSED'} {bar['name']}: "
            f"{bar['value']:.2f} ({bar['bar']:.2f})"
        )


if __name__ == "__main__":
    main()
