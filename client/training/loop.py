"""The loop: sample patients, clip and add up, noise, step.

Whatever the mode, the noise is added in one place, to one flat vector, before anything else
sees the sum; what follows it (averaging, optimizer, schedule) is post-processing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedward.client.training.parts import Loss
from fedward.client.training.plan import NotPrivate, Private, TrainingPlan
from fedward.client.training.prefetch import drawing_ahead
from fedward.client.training.session import Examples, Session, TrainingState, session
from fedward.privacy.accounting import DpEvent, dp_sgd_event
from fedward.privacy.mechanisms.noise import NoiseSource


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a site's round of training gives.

    Attributes:
        update: Trained minus given parameters, flat, in the order of `model.parameters()`;
            frozen ones have no place in it.
        steps: Steps that were taken.
        event: What they cost a patient; None under `NotPrivate()`.
        sanitised: Records, counted once a step, whose gradient was not finite and was taken as
            zero. Private: it stays at the site.
        clip_norm: Of the next round, where clipping is adaptive; infinite under `NotPrivate()`.
    """

    update: NDArray[np.float32]
    steps: int
    event: DpEvent | None
    sanitised: int
    clip_norm: float


def train(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    *,
    plan: TrainingPlan,
    noise: NoiseSource,
    resume: TrainingState | None = None,
    checkpoint: Callable[[TrainingState], None] | None = None,
) -> LocalResult:
    """Train `model` on a site's patients, as `plan` says.

    Each step takes every patient with probability `plan.sample_rate`, sums the gradients of a
    patient's records, clips the sum to `clip_norm`, adds up over patients, adds Gaussian noise
    and divides by the public `expected_batch_size` (Abadi et al., CCS 2016, Algorithm 1, with
    a fixed denominator). A step that no patient is in releases noise like any other.

    The order of draws from a source that repeats is part of the contract: in each step
    `uniform(num_patients)`, then `uniform(num_records)` where some patient has more than
    `max_records`, then `add_noise` to a vector of the trained parameters, then `add_noise` to
    the count of adaptive clipping.

    A round that stops goes on from the last state that `checkpoint` was given. The steps up to
    it are not taken again, and nothing of a step that was lost has left the site, so the plan's
    steps, charged once, cover the round.

    Args:
        model: Its parameters are where training starts, and afterwards where it ended. The same
            ones must be given on resuming.
        loss: Of outputs and labels, one value an example.
        examples: The site's records.
        plan: What to do.
        noise: The one source of sampling and noise.
        resume: The state to go on from.
        checkpoint: Called after every step but the last, with the state to go on from.

    Raises:
        ValueError: The mode does not fit the model, the model mixes records, or the state to
            resume from is of another plan.
    """
    with session(model, loss, examples, plan) as work:
        if resume is not None:
            work.restore(resume)
        return run_session(work, plan, noise=noise, checkpoint=checkpoint)


def run_session(
    work: Session,
    plan: TrainingPlan,
    *,
    noise: NoiseSource,
    checkpoint: Callable[[TrainingState], None] | None = None,
) -> LocalResult:
    """Take the plan's steps that are left; see `train`."""
    source = drawing_ahead(noise, steps=plan.steps)
    while work.steps < plan.steps:
        work.step(source)
        if checkpoint is not None and work.steps < plan.steps:
            checkpoint(work.state())
    work.finish()
    return LocalResult(work.update(), work.steps, event_of(plan), work.sanitised, work.clip_norm)


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
        total, _ = work.clipped_sum(work.draw(noise))
        return total.cpu().numpy().copy(), work.sanitised


def event_of(plan: TrainingPlan) -> DpEvent | None:
    """What the plan's steps cost a patient, as data; None under `NotPrivate()`."""
    match plan.guarantee:
        case NotPrivate():
            return None
        case Private(noise_multiplier=noise_multiplier):
            return dp_sgd_event(
                noise_multiplier=noise_multiplier, sample_rate=plan.sample_rate, steps=plan.steps
            )
