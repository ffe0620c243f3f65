"""What a study means at one site: sample rate, steps and noise, from public numbers only."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedward.client.training import Adaptive, NotPrivate, Private, TrainingPlan
from fedward.core.errors import AdmissionRefused
from fedward.core.site import Site
from fedward.core.study import Study
from fedward.privacy.accounting import calibrate
from fedward.strategies.registry import make_strategy
from fedward.transport.monitor import local_monitor_noise, monitor_mechanism
from fedward.transport.sums import distributed_mechanism

_COUNT_SHARE = 20  # of the batch, as in Andrew et al. 2021, section 3.1
_COUNT_NOISE = 2.0  # noise multipliers: gradients then need 1 / sqrt(1 - 1/16) of their noise


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """A study at one site.

    Attributes:
        weight: Aggregation weight: public number of training patients.
        sample_rate: Poisson inclusion probability of a patient in a step.
        steps: Steps of a round.
        rounds: Rounds of the run.
        noise_multiplier: Noise standard deviation over clip norm, of the site's own noise or, in
            mode "distributed", of that in the sum of the fewest sites; 0 only in mode "none".
            Where sites are protected `clip_norm` is that of a whole update.
        monitor_noise: Likewise of the histograms for drift; 0 where the study asks for none.
    """

    weight: float
    sample_rate: float
    steps: int
    rounds: int
    noise_multiplier: float
    monitor_noise: float = 0.0

    @property
    def expected_batch_size(self) -> float:
        """What gradients are averaged by: public, so that the true batch size stays private."""
        return self.sample_rate * self.weight

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def plan_site(study: Study, site: Site, *, sites: int = 0, size: int = 0) -> SitePlan:
    """Solve the study for a site: noise that keeps the whole run within its epsilon.

    Every number comes from the study or the site's public declarations, none from the patients.

    Args:
        study: What is asked.
        site: Who is asked.
        sites: Sites in the roster; mode "distributed" divides the noise among them.
        size: Number of parameters; likewise.

    Raises:
        AdmissionRefused: The study's batch is larger than the site, or the consortium is too
            small for it.
    """
    training = study.training
    weight = site.data.public_size * (1 - site.data.held_out)
    if training.sample_rate is not None:
        sample_rate = training.sample_rate
    else:
        sample_rate = (training.batch_size or 0) / weight
        if sample_rate > 1:
            raise AdmissionRefused(
                site=site.name,
                policy=f"[data] public_size = {site.data.public_size}",
                reason=f"[training] batch_size = {training.batch_size} is more than its training "
                f"patients ({weight:.0f}); lower it, or give sample_rate instead",
            )
    if training.local_steps is not None:
        steps = training.local_steps
    else:
        steps = max(1, math.ceil((training.local_epochs or 1.0) / sample_rate))
    noise_multiplier, monitor_noise = 0.0, local_monitor_noise(study)
    if study.privacy.mode == "distributed":
        try:
            noise_multiplier = distributed_mechanism(study, sites=sites, size=size).noise_multiplier
            if study.monitor is not None:
                monitor_noise = monitor_mechanism(study, sites=sites).noise_multiplier
        except ValueError as error:
            raise AdmissionRefused(
                site=site.name, policy="[policy] roster", reason=str(error)
            ) from error
    elif study.privacy.mode != "none":
        noise_multiplier = calibrate(
            epsilon=study.privacy.epsilon or 0.0,
            delta=study.privacy.delta,
            sample_rate=sample_rate,
            steps=steps * study.study.rounds,
            beside_epsilon=None if study.monitor is None else study.monitor.epsilon,
        )
    plan = SitePlan(
        weight=weight,
        sample_rate=sample_rate,
        steps=steps,
        rounds=study.study.rounds,
        noise_multiplier=noise_multiplier,
        monitor_noise=monitor_noise,
    )
    try:
        adaptive_clipping(study, plan)
    except ValueError as error:
        raise AdmissionRefused(
            site=site.name,
            policy=f"[privacy] clip_count_noise = {study.privacy.clip_count_noise} of the study",
            reason=f"{error}; raise it, or remove it for the default",
        ) from error
    return plan


def adaptive_clipping(
    study: Study, plan: SitePlan, *, start: float | None = None
) -> Adaptive | None:
    """How a site's clip norm moves; None where it does not.

    Unless the study says, the count has a noise of a twentieth of the expected batch, as in the
    paper, or of twice the noise multiplier where that is more: then it costs the gradients 3%.

    Raises:
        ValueError: The study's noise on the count leaves nothing for the gradients.
    """
    privacy = study.privacy
    if privacy.clipping == "fixed":
        return None
    least = max(plan.expected_batch_size / _COUNT_SHARE, _COUNT_NOISE * plan.noise_multiplier)
    found = Adaptive(
        quantile=privacy.clip_quantile or 0.5,
        learning_rate=privacy.clip_learning_rate or 0.2,
        count_noise=privacy.clip_count_noise or least,
        start=start,
    )
    Private(clip_norm=privacy.clip_norm, noise_multiplier=plan.noise_multiplier, adaptive=found)
    return found


def training_plan(
    study: Study, plan: SitePlan, *, round_number: int, start: float | None = None
) -> TrainingPlan:
    """What the trainer is told for one round, from 1.

    Args:
        study: The study.
        plan: What it means at the site.
        round_number: From 1.
        start: Where clipping is adaptive, what the round before ended with.
    """
    training, privacy = study.training, study.privacy
    # Where whole sites are protected, the update is clipped and the sum noised.
    guarantee = (
        NotPrivate()
        if privacy.mode == "none" or study.protects_sites
        else Private(
            clip_norm=privacy.clip_norm,
            noise_multiplier=plan.noise_multiplier,
            adaptive=adaptive_clipping(study, plan, start=start),
        )
    )
    return TrainingPlan(
        optimizer=training.optimizer,
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        steps=plan.steps,
        sample_rate=plan.sample_rate,
        expected_batch_size=plan.expected_batch_size,
        guarantee=guarantee,
        max_records=privacy.max_records,
        schedule=training.schedule,
        schedule_steps=plan.steps * plan.rounds,
        first_step=plan.steps * (round_number - 1),
        proximal=make_strategy(study.strategy.name, study.strategy.args).proximal,
        averaging=training.averaging,
    )
