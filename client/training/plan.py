"""What a site is told to do in a round, as a frozen value."""

import math
from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["sgd", "adam", "adamw"]
Mode = Literal["auto", "closed-form", "book-keeping", "ghost", "hooks", "functorch"]
Schedule = Literal["constant", "linear", "cosine"]
Averaging = Literal["last", "tail", "ema"]

MODES: tuple[Mode, ...] = ("closed-form", "book-keeping", "ghost", "hooks", "functorch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Let the clip norm follow a quantile of the patients' gradient norms.

    Andrew, Thakkar, McMahan and Ramaswamy, NeurIPS 2021, Algorithm 1. How many gradients were
    within the bound is released with noise in every step. The gradients' noise is raised such
    that both releases together cost what `noise_multiplier` says (their Theorem 1): there is
    nothing more to charge. The count is divided by the public batch size.

    Attributes:
        quantile: Share of patients, in (0, 1), whose gradients are to be within the bound.
        learning_rate: Of the logarithm of the clip norm.
        count_noise: Standard deviation of the noise on the count; more than half of
            `noise_multiplier`. The paper takes a twentieth of the batch size.
        start: Clip norm of the first step, where a round goes on from the one before; None for
            that of the guarantee.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float
    start: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no training can mean."""
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is in (0, 1), not {self.quantile}")
        _positive("learning_rate", self.learning_rate)
        _positive("count_noise", self.count_noise)
        if self.start is not None:
            _positive("start", self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Private:
    """Clip every patient's gradient, and add Gaussian noise to their sum.

    Attributes:
        clip_norm: L2 bound of one patient's part in a step, > 0.
        noise_multiplier: Standard deviation of the noise over `clip_norm`, > 0; what a step is
            charged as.
        adaptive: How `clip_norm` moves from where it starts; None leaves it.
    """

    clip_norm: float
    noise_multiplier: float
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        """Refuse what no training can mean."""
        _positive("clip_norm", self.clip_norm)
        _positive("noise_multiplier", self.noise_multiplier)
        if self.adaptive and 2 * self.adaptive.count_noise <= self.noise_multiplier:
            raise ValueError(
                f"count_noise = {self.adaptive.count_noise} leaves nothing for the gradients; "
                f"it is more than half of noise_multiplier = {self.noise_multiplier}"
            )

    @property
    def first_clip_norm(self) -> float:
        """Of the first step."""
        start = self.adaptive.start if self.adaptive else None
        return self.clip_norm if start is None else start

    @property
    def gradient_noise_multiplier(self) -> float:
        """Of the noise on gradients; above `noise_multiplier` where a count is released too."""
        if self.adaptive is None:
            return self.noise_multiplier
        # The count moves by at most 1/2 about its centre, so its noise multiplier is twice its
        # standard deviation; precisions add up to that of `noise_multiplier`.
        count = 2 * self.adaptive.count_noise
        return float((self.noise_multiplier**-2 - count**-2) ** -0.5)


@dataclass(frozen=True, slots=True)
class NotPrivate:
    """No clipping and no noise: the update tells about patients. The same sampler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """One site's training in one round.

    Attributes:
        optimizer: The rule that turns gradients into steps, as in `torch.optim`.
        learning_rate: Step size before the schedule, > 0.
        momentum: Of `sgd`, in [0, 1); the others have their own.
        weight_decay: Decoupled for `adamw`, else added to the (released) gradient.
        steps: Number of steps, >= 1.
        sample_rate: Probability in (0, 1] with which a patient is in a step.
        expected_batch_size: What the sum of gradients is divided by, in patients. It must be
            public: `sample_rate` times the site's public size, never the size of a batch.
        guarantee: `Private(...)`, or `NotPrivate()` by name.
        max_records: How many records of one patient a step uses at most; of a patient with
            more, a random choice anew in each step.
        mode: How per-patient gradients are clipped; all give the same sums.
        memory_limit_mb: Batches are worked through in parts that stay below this.
        schedule: How the learning rate falls over `schedule_steps` steps.
        schedule_steps: Length of the schedule over all rounds; 0 means `steps`.
        first_step: Number of steps taken in the rounds before, where the schedule stands.
        proximal: Weight of half the squared distance from where the round began, added to the
            loss (Li et al., MLSys 2020). It is of parameters alone and costs nothing.
        averaging: What a round gives: the `last` iterate, the mean of the second half of them
            (`tail`), or their exponential moving average (`ema`). All cost nothing.
        ema_decay: Of `ema`, in (0, 1).
    """

    optimizer: Optimizer = "sgd"
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    steps: int
    sample_rate: float
    expected_batch_size: float
    guarantee: Private | NotPrivate
    max_records: int = 1
    mode: Mode = "auto"
    memory_limit_mb: float = 512.0
    schedule: Schedule = "constant"
    schedule_steps: int = 0
    first_step: int = 0
    proximal: float = 0.0
    averaging: Averaging = "last"
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        """Refuse what no training can mean."""
        _positive("learning_rate", self.learning_rate)
        _positive("expected_batch_size", self.expected_batch_size)
        _positive("memory_limit_mb", self.memory_limit_mb)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is in [0, 1), not {self.momentum}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.optimizer} has its own")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay is 0 or more, not {self.weight_decay}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is in (0, 1], not {self.sample_rate}")
        if self.steps < 1 or self.max_records < 1:
            raise ValueError(
                f"steps and max_records are 1 or more, not {self.steps} and {self.max_records}"
            )
        if self.first_step < 0 or self.schedule_steps < 0:
            raise ValueError("first_step and schedule_steps are 0 or more")
        if not (self.proximal >= 0 and math.isfinite(self.proximal)):
            raise ValueError(f"proximal is 0 or more, not {self.proximal}")
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is in (0, 1), not {self.ema_decay}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step` of this round, from 0.

        `linear` and `cosine` fall to zero at the end of the schedule (Loshchilov and Hutter,
        ICLR 2017, without restarts); after it the rate stays zero.
        """
        if self.schedule == "constant":
            return self.learning_rate
        total = self.schedule_steps or self.first_step + self.steps
        done = min(1.0, (self.first_step + step) / total)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is above 0 and finite, not {value}")
