"""This installation's trainer, audited from outside: every way of clipping, on every kind of model.

What `fedward audit --conformance` runs. A hospital can run it on its own machine: it takes no
patient, only random records, and looks at what the trainer releases.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training.plan import MODES, Mode
from fedward.client.training.trial import trainer_of
from fedward.privacy.audits.conformance import FALSE_ALARM, Records, check_conformance

_WORDS = 4000
_CLASSES = 3
_RECORDS = 20


class Text(nn.Module):
    """Word vectors, what `cell` makes of them, and a linear layer on their mean."""

    def __init__(self, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(_WORDS, 8), cell
        self.head = nn.Linear(8, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape `(rows, 3)` for words of shape `(rows, length)`."""
        h = self.words(x)
        if self.cell is not None:
            h = self.cell(h)[0]
        outputs: Tensor = self.head(h.mean(1))
        return outputs


class Attention(nn.Module):
    """One head of attention over vectors of 8, normalised first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The shape of `x`, in a tuple as recurrent cells give it."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return (x + torch.softmax(q @ k.transpose(1, 2), -1) @ v,)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of model.

    Attributes:
        build: A model of it.
        shape: Of one record's numbers; None where a record is four words.
        not_modes: Ways of clipping that do not know its layers.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None
    not_modes: tuple[Mode, ...] = ("closed-form",)

    def records(self) -> Records:
        """Twenty random records, always the same."""
        rng = np.random.default_rng(1)
        features: NDArray[Any]
        if self.shape is None:
            features = rng.integers(0, _WORDS, (_RECORDS, 4))
        else:
            features = rng.standard_normal((_RECORDS, *self.shape)).astype(np.float32)
        return Records(features=features, labels=rng.integers(0, _CLASSES, _RECORDS))


# Large enough that 200,000 draws of noise are a few steps.
FAMILIES: Mapping[str, Family] = {
    "logistic": Family(lambda: nn.Linear(8000, _CLASSES), (8000,), not_modes=()),
    "perceptron": Family(
        lambda: nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, _CLASSES)), (200,)
    ),
    "convolutional": Family(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 64),
            nn.Tanh(),
            nn.Linear(64, _CLASSES),
        ),
        (1, 8, 8),
    ),
    "text": Family(Text),
    "transformer": Family(lambda: Text(Attention())),
    "recurrent": Family(
        lambda: Text(nn.GRU(8, 8, batch_first=True)), not_modes=("closed-form", "ghost")
    ),
}


def combinations(modes: Sequence[Mode] = MODES) -> Iterator[tuple[str, Mode]]:
    """Every kind of model with every way of clipping that it can have."""
    for name, family in FAMILIES.items():
        for mode in modes:
            if mode not in family.not_modes:
                yield name, mode


def audit_conformance(
    modes: Sequence[Mode] = MODES, *, show: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Audit the trainer that is installed here.

    Args:
        modes: Ways of clipping; "auto" is what a study gets that names none.
        show: Told which combination is on.

    Returns:
        `{"passed", "false_alarm", "seconds", "results": [{"family", "mode", "passed", "checks"}]}`
    """
    started = time.monotonic()
    results = []
    for name, mode in combinations(modes):
        if show is not None:
            show(f"{name}, {mode}")
        results.append(audit_one(name, mode))
    return {
        "passed": all(result["passed"] for result in results),
        "false_alarm": FALSE_ALARM,
        "seconds": round(time.monotonic() - started, 1),
        "results": results,
    }


def audit_one(family: str, mode: Mode) -> dict[str, Any]:
    """One of the `results` of `audit_conformance`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the model's first parameters, and nothing else
        model = FAMILIES[family].build()
    report = check_conformance(
        trainer_of(lambda: copy.deepcopy(model), _cross_entropy, mode=mode),
        FAMILIES[family].records(),
        # Opacus' ghost clipping knows no patients with several records.
        max_records=1 if mode == "ghost" else 5,
        runs=12,
    )
    return {"family": family, "mode": mode, **report.to_json()}


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")
