"""The trainer as the conformance audit calls it."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedward.client.training.loop import train
from fedward.client.training.parts import Loss
from fedward.client.training.plan import Mode, Private, TrainingPlan
from fedward.privacy.audits.conformance import Trainer, Trial
from fedward.tasks.task import Examples


def trainer_of(build: Callable[[], nn.Module], loss: Loss, *, mode: Mode = "auto") -> Trainer:
    """This package's `train`, for `fedward.privacy.audits.conformance.check_conformance`.

    Args:
        build: A model, always with the same parameters.
        loss: Of outputs and labels, one value an example.
        mode: How gradients are clipped.
    """

    def run(trial: Trial) -> NDArray[np.float32]:
        plan = TrainingPlan(
            learning_rate=trial.learning_rate,
            steps=trial.steps,
            sample_rate=trial.sample_rate,
            expected_batch_size=trial.expected_batch_size,
            guarantee=Private(clip_norm=trial.clip_norm, noise_multiplier=trial.noise_multiplier),
            max_records=trial.max_records,
            mode=mode,
        )
        examples = Examples(trial.features, trial.labels, trial.units)
        return train(build(), loss, examples, plan=plan, noise=trial.noise).update

    return run
