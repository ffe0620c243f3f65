"""A model laid out for training: its trained parameters as views of one vector.

Laying it out costs about as much as a step of a small model, so whoever trains one model for
many sites does it once.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedward.client.training.clippers import Clipper, Plain
from fedward.client.training.memory import keep_freed_memory, patients_at_once
from fedward.client.training.modes import choose_mode, make_clipper
from fedward.client.training.parts import Loss
from fedward.client.training.plan import Mode, NotPrivate, Private, TrainingPlan
from fedward.client.training.recurrent import unroll
from fedward.client.training.sampler import PoissonSampler
from fedward.client.training.threads import follow_torch


class Layout:
    """What a round needs of a model, whosever round it is.

    Args:
        model: In training mode from here to `close`.
        loss: Of outputs and labels, one value an example.
        plan: Decides whether and how gradients are clipped.
        sampler: What the site's batches look like.

    Attributes:
        flat: The trained parameters as one vector, of which the model's are views.
        mode: How gradients are clipped; None under `NotPrivate()`.
        at_once: How many patients are worked through together; see `patients_at_once`.
        clipper: Sums gradients.

    Raises:
        ValueError: The mode does not fit the model, or the model mixes records.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, plan: TrainingPlan, sampler: PoissonSampler
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the model has no parameter to train")
        self._model, self._trained = model, trained
        self._training = model.training
        self._restore: Callable[[], None] = _nothing
        keep_freed_memory()
        if isinstance(plan.guarantee, Private):
            self._restore = unroll(model)
        try:
            self.mode = _mode_of(model, plan, records=sampler.records)
            one = sampler.first()
            self.at_once = (
                patients_at_once(model, one, mode=self.mode, limit_mb=plan.memory_limit_mb)
                if one.patients
                else 1
            )
            self.train()
            if self.mode is not None:
                follow_torch()
            self.clipper: Clipper = (
                Plain(model, loss, trained)
                if self.mode is None
                else make_clipper(model, loss, trained, mode=self.mode)
            )
        except BaseException:
            self._restore()
            model.train(self._training)
            raise
        # Nothing below fails: from here on the parameters are views of one vector, until `close`.
        self._own = [p.data for p in trained]
        self.flat = torch.cat([p.detach().reshape(-1) for p in trained])
        sizes = [p.numel() for p in trained]
        for p, view in zip(trained, torch.split(self.flat, sizes), strict=True):
            p.data = view.view(p.shape)

    def train(self) -> None:
        """Put the model in training mode."""
        if not self._model.training:
            self._model.train()

    def put(self, parameters: NDArray[np.float32]) -> None:
        """Start from these parameters, all that are trained, in the model's order."""
        self.flat.copy_(torch.from_numpy(parameters.copy()))

    def close(self) -> None:
        """Give the parameters their own memory again, holding what was trained."""
        self.clipper.close()
        for p, own in zip(self._trained, self._own, strict=True):
            own.copy_(p.data)
            p.data = own
        self._restore()
        if self._model.training != self._training:
            self._model.train(self._training)


def _mode_of(model: nn.Module, plan: TrainingPlan, *, records: int) -> Mode | None:
    if isinstance(plan.guarantee, NotPrivate):
        return None
    if plan.mode != "auto":
        return plan.mode
    return choose_mode(model, batch_size=plan.expected_batch_size, records=records)


def _nothing() -> None:
    """Without privacy, fused layers stay as they are."""
