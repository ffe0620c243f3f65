"""The loop: sample patients, clip and add up, noise, step.

Whatever the mode, the noise is added in one place, to one flat vector, before anything else
sees the sum; what follows it (averaging, optimizer, schedule) is post-processing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.bookkeeping import Loss
from fedward.client.training.clippers import Clipper, Plain
from fedward.client.training.modes import choose_mode, make_clipper
from fedward.client.training.optimizers import FlatOptimizer
from fedward.client.training.plan import NotPrivate, Private, TrainingPlan
from fedward.client.training.prefetch import drawing_ahead
from fedward.client.training.recurrent import unroll
from fedward.client.training.sampler import Batch, PoissonSampler
from fedward.privacy.accounting import DpEvent, dp_sgd_event
from fedward.privacy.mechanisms.noise import NoiseSource, add_noise


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
class LocalResult:
    """What a site's round of training gives.

    Attributes:
        update: Trained minus given parameters, flat, in the order of `model.parameters()`;
            zero for frozen ones.
        steps: Steps that were taken.
        event: What they cost a patient; None under `NotPrivate()`.
        sanitised: Records, counted once a step, whose gradient was not finite and was taken as
            zero. Private: it stays at the site.
    """

    update: NDArray[np.float32]
    steps: int
    event: DpEvent | None
    sanitised: int


def train(
    model: nn.Module, loss: Loss, examples: Examples, *, plan: TrainingPlan, noise: NoiseSource
) -> LocalResult:
    """Train `model` on a site's patients, as `plan` says.

    Each step takes every patient with probability `plan.sample_rate`, sums the gradients of a
    patient's records, clips the sum to `clip_norm`, adds up over patients, adds Gaussian noise
    and divides by the public `expected_batch_size` (Abadi et al., CCS 2016, Algorithm 1, with
    a fixed denominator). A step that no patient is in releases noise like any other.

    The order of draws from a source that repeats is part of the contract: in each step
    `uniform(num_patients)`, then `uniform(num_records)` where some patient has more than
    `max_records`, then `add_noise` to a vector of the trained parameters.

    Args:
        model: Its parameters are where training starts, and afterwards where it ended.
        loss: Of outputs and labels, one value an example.
        examples: The site's records.
        plan: What to do.
        noise: The one source of sampling and noise.

    Raises:
        ValueError: The mode does not fit the model, or the model mixes records.
    """
    source = drawing_ahead(noise, steps=plan.steps)
    with session(model, loss, examples, plan) as work:
        for step in range(plan.steps):
            work.step(step, source)
        update = work.update()
        return LocalResult(update, plan.steps, event_of(plan), work.sanitised)


def sampled_clipped_sum(
    model: nn.Module, loss: Loss, examples: Examples, *, plan: TrainingPlan, noise: NoiseSource
) -> tuple[NDArray[np.float32], int]:
    """One step's sum of clipped gradients, NOT PRIVATE until noise is added to it.

    For mechanisms that add their noise elsewhere, such as a share of discrete noise under
    secure aggregation. Nothing of it may leave the site as it is.

    Returns:
        The sum, flat, over the trained parameters, and how many records were sanitised.

    Raises:
        ValueError: The plan is `NotPrivate()`, so that there is no bound to clip to.
    """
    if isinstance(plan.guarantee, NotPrivate):
        raise ValueError("a clipped sum needs the clip_norm of a Private(...) plan")  # noqa: TRY004 (a choice, not a type)
    with session(model, loss, examples, plan) as work:
        total = work.clipped_sum(work.draw(noise))
        return total.cpu().numpy(), work.sanitised


def event_of(plan: TrainingPlan) -> DpEvent | None:
    """What the plan's steps cost a patient, as data; None under `NotPrivate()`."""
    match plan.guarantee:
        case NotPrivate():
            return None
        case Private(noise_multiplier=noise_multiplier):
            return dp_sgd_event(
                noise_multiplier=noise_multiplier, sample_rate=plan.sample_rate, steps=plan.steps
            )


class Session:
    """One round's state: flat parameters, clipper, sampler, optimizer. Use `session`.

    Attributes:
        flat: The trained parameters as one vector, of which the model's are views.
        sanitised: Records whose gradient was taken as zero, so far.
        mode: How gradients are clipped; "none" under `NotPrivate()`.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, examples: Examples, plan: TrainingPlan
    ) -> None:
        self._plan = plan
        self._parameters = list(model.parameters())
        trained = [p for p in self._parameters if p.requires_grad]
        if not trained:
            raise ValueError("the model has no parameter to train")
        self._trained = trained
        self._model = model
        self.sanitised = 0
        self._sampler = PoissonSampler(
            examples.features,
            examples.labels,
            examples.units,
            sample_rate=plan.sample_rate,
            max_records=plan.max_records,
            device=trained[0].device,
        )
        self._training = model.training
        self._restore = unroll(model) if isinstance(plan.guarantee, Private) else _nothing
        model.train()
        try:
            self._clipper = _make(model, loss, trained, plan=plan, records=self._sampler.records)
        except ValueError:
            self._restore()
            model.train(self._training)
            raise
        # Nothing below fails: from here on the parameters are views of one vector, until `close`.
        self._own = [p.data for p in trained]
        self.flat = torch.cat([p.detach().reshape(-1) for p in trained])
        self._start = self.flat.clone()
        for p, view in zip(
            trained, torch.split(self.flat, [p.numel() for p in trained]), strict=True
        ):
            p.data = view.view(p.shape)
        self._optimizer = FlatOptimizer(
            self.flat,
            optimizer=plan.optimizer,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
        )

    def draw(self, noise: NoiseSource) -> Batch:
        """Who takes part in the next step."""
        return self._sampler.draw(noise)

    def clipped_sum(self, batch: Batch) -> Tensor:
        """The sum of the patients' clipped gradients, flat: not private yet."""
        total: Tensor | None = None
        for part in self._parts(batch):
            clipped = self._clipper(part, clip_norm=self._clip_norm)
            self.sanitised += clipped.sanitised
            if total is None:
                total = clipped.total if part is batch else clipped.total.clone()
            else:
                total.add_(clipped.total)
        return torch.zeros_like(self.flat) if total is None else total

    @property
    def _clip_norm(self) -> float:
        guarantee = self._plan.guarantee
        return guarantee.clip_norm if isinstance(guarantee, Private) else float("inf")

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        if batch.patients:
            yield batch

    def step(self, step: int, noise: NoiseSource) -> None:
        """Draw a batch and take a step, the `step`-th of this round from 0."""
        self.take(self.draw(noise), step, noise)

    def take(self, batch: Batch, step: int, noise: NoiseSource) -> None:
        """Take a step; after the noise is added nothing looks at a patient again."""
        total = self.clipped_sum(batch)
        guarantee = self._plan.guarantee
        if isinstance(guarantee, Private):
            released = add_noise(
                total.cpu().numpy(),
                std=guarantee.noise_multiplier * guarantee.clip_norm,
                source=noise,
            )
            total = torch.from_numpy(released).to(total.device)
        total.div_(self._plan.expected_batch_size)
        self._optimizer.step(total, learning_rate=self._plan.learning_rate_at(step))

    def update(self) -> NDArray[np.float32]:
        """Trained minus given parameters; zero where frozen."""
        moved = iter(torch.split(self.flat - self._start, [p.numel() for p in self._trained]))
        parts = [
            next(moved) if p.requires_grad else torch.zeros(p.numel()) for p in self._parameters
        ]
        vector: NDArray[np.float32] = torch.cat([part.float().cpu() for part in parts]).numpy()
        return vector

    def close(self) -> None:
        """Give the parameters their own memory again, holding what was trained."""
        self._clipper.close()
        for p, own in zip(self._trained, self._own, strict=True):
            own.copy_(p.data)
            p.data = own
        self._restore()
        self._model.train(self._training)


def _make(
    model: nn.Module,
    loss: Loss,
    trained: Sequence[nn.Parameter],
    *,
    plan: TrainingPlan,
    records: int,
) -> Clipper:
    if isinstance(plan.guarantee, NotPrivate):
        return Plain(model, loss, trained)
    mode = plan.mode
    if mode == "auto":
        mode = choose_mode(model, batch_size=plan.expected_batch_size, records=records)
    return make_clipper(model, loss, trained, mode=mode)


def _nothing() -> None:
    """Without privacy, fused layers stay as they are."""


@contextmanager
def session(
    model: nn.Module, loss: Loss, examples: Examples, plan: TrainingPlan
) -> Iterator[Session]:
    """A round's state, which is taken off the model at the end, whatever happens."""
    work = Session(model, loss, examples, plan)
    try:
        yield work
    finally:
        work.close()
