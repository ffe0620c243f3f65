"""What every contender is given, and how it reports. Needs NumPy and torch only.

The folder holds `job.json` and `data.npz`, written by `simulation.py`: the arrays, and which rows
each site has.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STARTED = time.perf_counter()


@dataclass
class Job:
    """The job: sites' tensors, test tensors, and the settings of `job.json`."""

    sites: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    model: str
    rounds: int
    batch: int
    learning_rate: float
    clip_norm: float
    noise_multiplier: float

    def batches(self, rows: int) -> Iterator[Tensor]:
        """One epoch in a random order."""
        yield from torch.randperm(rows).split(self.batch)


def load(folder: str) -> Job:
    """Read a job's folder."""
    settings = json.loads((Path(folder) / "job.json").read_text())
    data = np.load(Path(folder) / "data.npz")
    kind = torch.float32 if settings["model"] == "logistic" else torch.int64
    x, y = torch.from_numpy(data["train_x"]), torch.from_numpy(data["train_y"]).to(kind)
    chosen = torch.from_numpy(data["rows"])
    rows = [chosen[a:b] for a, b in pairwise(data["starts"])]
    test = torch.from_numpy(data["test_x"]), torch.from_numpy(data["test_y"])
    return Job([(x[r], y[r]) for r in rows], test, **settings)


def make_model(work: Job) -> nn.Module:
    """The start that everybody has."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"mlp": [30, 64, 2], "logistic": [30, 1]}[work.model]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        if layers:
            layers.append(nn.ReLU())
        layer = nn.Linear(inputs, outputs)
        for p in layer.parameters():
            bound = 1 / math.sqrt(inputs)
            with torch.no_grad():
                p.uniform_(-bound, bound, generator=generator)
        layers.append(layer)
    return nn.Sequential(*layers)


def loss_of(work: Job) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy."""
    if work.model == "mlp":
        return nn.functional.cross_entropy
    return lambda outputs, labels: nn.functional.binary_cross_entropy_with_logits(
        outputs.reshape(-1), labels
    )


def accuracy(work: Job, model: nn.Module) -> float:
    """On the test rows."""
    x, y = work.test
    with torch.no_grad():
        outputs = model(x)
    said = outputs.argmax(1) if outputs.shape[1] == 2 else outputs.reshape(-1) > 0
    return float((said == y).float().mean())


class Clock:
    """Seconds of each round, on the wall and of this process's processor time."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._then = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        """A round is over."""
        now = time.perf_counter(), time.process_time()
        self.wall.append(now[0] - self._then[0])
        self.cpu.append(now[1] - self._then[1])
        self._then = now


def _peak_mb() -> float:
    """This process's own peak; `ru_maxrss` would be at least what its parent had when it began."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def report(work: Job, model: nn.Module, clock: Clock, **more: Any) -> None:
    """One line of JSON: what the benchmark reads."""
    value = {
        "accuracy": accuracy(work, model),
        "round_wall": clock.wall,
        "round_cpu": clock.cpu,
        "seconds_in_process": time.perf_counter() - STARTED,
        "max_rss_mb": _peak_mb(),
        **more,
    }
    sys.stdout.write("RESULT " + json.dumps(value) + "\n")
    sys.stdout.flush()
