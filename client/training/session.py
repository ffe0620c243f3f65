"""What a round of training holds while it runs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.layout import Layout
from fedward.client.training.optimizers import FlatOptimizer
from fedward.client.training.parts import Loss
from fedward.client.training.plan import Private, TrainingPlan
from fedward.client.training.sampler import Batch, PoissonSampler
from fedward.privacy.mechanisms.noise import NoiseSource, add_noise

_CLIP_RANGE = 1e4  # adaptive clipping stays within this factor of where it started


class Examples(Protocol):
    """What a task prepares: rows, labels, and which patient a row is of."""

    @property
    def features(self) -> NDArray[np.generic]:
        """Shape `(num_records, ...)`."""

    @property
    def labels(self) -> NDArray[np.generic]:
        """Shape `(num_records, ...)`."""

    @property
    def units(self) -> NDArray[np.int64]:
        """Shape `(num_records,)`, 0 to num_patients - 1."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a round stands between two steps. Private: it stays at the site.

    Attributes:
        steps: Steps taken.
        clip_norm: As adaptive clipping left it.
        sanitised: Records whose gradient was taken as zero, so far.
        arrays: Parameters, optimizer state and average, by name; for safetensors.
    """

    steps: int
    clip_norm: float
    sanitised: int
    arrays: dict[str, NDArray[np.float32]]


class Session:
    """One round's state on a laid-out model: sampler, optimizer, steps. Use `session`.

    Attributes:
        flat: The trained parameters as one vector, of which the model's are views.
        clip_norm: The bound of the next step.
        sanitised: Records whose gradient was taken as zero, so far.
        mode: How gradients are clipped; None under `NotPrivate()`.
        steps: Steps taken.
    """

    def __init__(self, layout: Layout, sampler: PoissonSampler, plan: TrainingPlan) -> None:
        self._plan = plan
        self._layout, self._sampler = layout, sampler
        self.flat, self._clipper, self.mode = layout.flat, layout.clipper, layout.mode
        self.sanitised = 0
        self.steps = 0
        guarantee = plan.guarantee
        self.clip_norm = (
            guarantee.first_clip_norm if isinstance(guarantee, Private) else float("inf")
        )
        self._at_once = layout.at_once
        self._start = self.flat.clone()
        self._average = None if plan.averaging == "last" else torch.zeros_like(self.flat)
        self._optimizer = FlatOptimizer(
            self.flat,
            optimizer=plan.optimizer,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
        )

    def draw(self, noise: NoiseSource) -> Batch:
        """Who takes part in the next step."""
        return self._sampler.draw(noise)

    def clipped_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The sum of the patients' clipped gradients, flat, and how many were within the bound.

        Neither is private yet.
        """
        adaptive = isinstance(self._plan.guarantee, Private) and self._plan.guarantee.adaptive
        patients = batch.patients
        if 0 < patients <= self._at_once and not adaptive:
            clipped = self._clipper(batch, clip_norm=self.clip_norm)
            self.sanitised += clipped.sanitised
            return clipped.total, 0
        total: Tensor | None = None
        within = 0
        for part in self._parts(batch):
            clipped = self._clipper(part, clip_norm=self.clip_norm)
            self.sanitised += clipped.sanitised
            if total is None:
                total = clipped.total if part is batch else clipped.total.clone()
            else:
                total.add_(clipped.total)
            if adaptive:
                within += int((clipped.squared_norms <= self.clip_norm**2).sum())
        return torch.zeros_like(self.flat) if total is None else total, within

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """The batch, in parts that stay below the plan's memory limit."""
        if not batch.patients:
            return
        if batch.patients <= self._at_once:
            yield batch
            return
        size = math.ceil(batch.patients / math.ceil(batch.patients / self._at_once))
        for start in range(0, batch.patients, size):
            yield batch.part(start, min(batch.patients, start + size))

    def step(self, noise: NoiseSource) -> None:
        """Draw a batch and take a step."""
        self.take(self.draw(noise), noise)

    def take(self, batch: Batch, noise: NoiseSource) -> None:
        """Take a step; after the noise is added nothing looks at a patient again."""
        total, within = self.clipped_sum(batch)
        guarantee = self._plan.guarantee
        if isinstance(guarantee, Private):
            std = guarantee.gradient_noise_multiplier * self.clip_norm
            # In place: nothing without noise is left.
            summed = total.cpu().numpy()
            released = add_noise(
                summed, std=std, sensitivity=self.clip_norm, source=noise, out=summed
            )
            if total.device.type != "cpu":
                total = torch.from_numpy(released).to(total.device)
            self._adapt(guarantee, within - batch.patients / 2, noise)
        if self._plan.proximal and self.steps:
            pull = self._plan.proximal * self._plan.expected_batch_size
            total.add_(self.flat - self._start, alpha=pull)
        self._optimizer.step(
            total,
            learning_rate=self._plan.learning_rate_at(self.steps),
            scale=1 / self._plan.expected_batch_size,
        )
        self.steps += 1
        self._add_to_average()

    def _adapt(self, guarantee: Private, centred_count: float, noise: NoiseSource) -> None:
        adaptive = guarantee.adaptive
        if adaptive is None:
            return
        released = add_noise(
            np.array([centred_count]), std=adaptive.count_noise, sensitivity=0.5, source=noise
        )
        share = float(released[0]) / self._plan.expected_batch_size + 0.5
        self.clip_norm *= float(np.exp(-adaptive.learning_rate * (share - adaptive.quantile)))
        low, high = guarantee.clip_norm / _CLIP_RANGE, guarantee.clip_norm * _CLIP_RANGE
        self.clip_norm = min(high, max(low, self.clip_norm))

    def _add_to_average(self) -> None:
        if self._average is None:
            return
        if self._plan.averaging == "ema":
            self._average.lerp_(self.flat, 1 - self._plan.ema_decay)
        elif self.steps > self._plan.steps // 2:
            self._average.add_(self.flat)

    def finish(self) -> None:
        """Put the average, if the plan has one, in the place of the last iterate."""
        if self._average is None:
            return
        if self._plan.averaging == "ema":
            # The average started at zero, as Adam's moments do.
            self._average.div_(1 - self._plan.ema_decay**self.steps)
        else:
            self._average.div_(self._plan.steps - self._plan.steps // 2)
        self.flat.copy_(self._average)

    def update(self) -> NDArray[np.float32]:
        """Trained minus given parameters, of those that are trained."""
        return (self.flat - self._start).float().cpu().numpy()

    def state(self) -> TrainingState:
        """What `restore` needs to go on after this step."""
        arrays = {f"optimizer.{name}": value for name, value in self._optimizer.state().items()}
        arrays["parameters"] = self.flat.cpu().numpy().copy()
        if self._average is not None:
            arrays["average"] = self._average.cpu().numpy().copy()
        return TrainingState(self.steps, self.clip_norm, self.sanitised, arrays)

    def restore(self, state: TrainingState) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: The state is of another plan or another model.
        """
        arrays = dict(state.arrays)
        own = {"parameters": self.flat}
        if self._average is not None:
            own["average"] = self._average
        for name, value in own.items():
            array = arrays.pop(name, None)
            if array is None or array.shape != tuple(value.shape):
                raise ValueError(f"the state's {name} is of another plan or another model")
            value.copy_(torch.from_numpy(array))
        if not 0 <= state.steps <= self._plan.steps:
            raise ValueError(f"the state is after {state.steps} of {self._plan.steps} steps")
        self._optimizer.restore(
            {name.removeprefix("optimizer."): array for name, array in arrays.items()},
            steps=state.steps,
        )
        self.steps, self.clip_norm, self.sanitised = state.steps, state.clip_norm, state.sanitised


def make_sampler(examples: Examples, plan: TrainingPlan, *, device: torch.device) -> PoissonSampler:
    """Who takes part in each step of a plan."""
    return PoissonSampler(
        examples.features,
        examples.labels,
        examples.units,
        sample_rate=plan.sample_rate,
        max_records=plan.max_records,
        device=device,
    )


@contextmanager
def session(
    model: nn.Module, loss: Loss, examples: Examples, plan: TrainingPlan
) -> Iterator[Session]:
    """A round's state, which is taken off the model at the end, whatever happens."""
    first = next((p for p in model.parameters() if p.requires_grad), None)
    if first is None:
        raise ValueError("the model has no parameter to train")
    sampler = make_sampler(examples, plan, device=first.device)
    layout = Layout(model, loss, plan, sampler)
    try:
        yield Session(layout, sampler, plan)
    finally:
        layout.close()
