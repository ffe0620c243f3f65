"""What a study may cost here, and has: between the study, the plan and the ledger."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fedward.client.plan import SitePlan
from fedward.core.site import Site
from fedward.core.study import Study
from fedward.privacy.accounting import (
    DpEvent,
    calibrate_gaussian,
    compose,
    dp_sgd_event,
    event_to_json,
    gaussian_event,
    privacy_spent,
)
from fedward.privacy.accounting.events import Leaves, event_of, leaves
from fedward.privacy.ledger import Ledger, Reservation
from fedward.privacy.units import guarantees_to_json, patient_guarantees
from fedward.transport.monitor import metrics_sensitivity, monitor_round, monitor_sensitivity

_EVALUATION_ROUND = 1
_ACCEPTANCE = "whether the site takes the release: one word about its held-out patients"


@dataclass(frozen=True, slots=True)
class Budget:
    """One private study at one site.

    Training patients and held-out patients are two populations that no patient is both of, so
    each has the study's whole epsilon; see docs/privacy.md.
    """

    site: Site
    study: Study
    plan: SitePlan
    ledger: Ledger

    @property
    def evaluation_noise(self) -> float:
        """Noise multiplier of the one release of metrics."""
        epsilon = self.study.privacy.epsilon or 0.0
        return calibrate_gaussian(epsilon=epsilon, delta=self.study.privacy.delta)

    @property
    def evaluation_sensitivity(self) -> float:
        """Of the counts of metrics together."""
        return metrics_sensitivity(self.study)

    def allot(self) -> None:
        """Ask the ledger for the whole run.

        Raises:
            BudgetExceeded: The limit of the site's policy would be passed. Nothing was recorded.
        """
        policy = self.site.policy
        self.ledger.allot(
            study=self.study.hash,
            event=self._whole_run(),
            max_epsilon=policy.max_epsilon,
            delta=policy.delta,
            unit=self.study.privacy.unit,
            population="training",
        )
        self.ledger.allot(
            study=self._evaluation,
            event=gaussian_event(self.evaluation_noise),
            max_epsilon=policy.max_epsilon,
            delta=policy.delta,
            unit=self.study.privacy.unit,
            population="held-out",
        )

    def reserve_round(self, round_number: int) -> Reservation:
        """Reserve a round, on disk, before it is trained.

        A round that was begun before and never finished has to be paid for again; that goes
        beyond the study's allotment, so it is granted only within the site's limit.

        Raises:
            BudgetExceeded: Nothing was recorded; train nothing.
        """
        event = self._steps(self.plan.steps)
        if self.begun(round_number) is not None:
            policy = self.site.policy
            self.ledger.extend(
                study=self.study.hash,
                event=event,
                max_epsilon=policy.max_epsilon,
                delta=policy.delta,
            )
        return self.ledger.reserve(study=self.study.hash, round_number=round_number, event=event)

    def begun(self, round_number: int) -> Reservation | None:
        """The newest reservation of a round that no update was settled with."""
        return self.ledger.unsettled(study=self.study.hash, round_number=round_number)

    def reserve_evaluation(self) -> Reservation:
        """Reserve the release of metrics. Raises `BudgetExceeded` if it was released already."""
        return self.ledger.reserve(
            study=self._evaluation,
            round_number=_EVALUATION_ROUND,
            event=gaussian_event(self.evaluation_noise),
        )

    def reserve_monitor(self) -> Reservation:
        """Reserve the release of histograms. Raises `BudgetExceeded` if there was one already."""
        return self.ledger.reserve(
            study=self.study.hash,
            round_number=monitor_round(self.study),
            event=gaussian_event(self.plan.monitor_noise),
        )

    def close(self) -> None:
        """End the study: what it did not use is free again."""
        for study in (self.study.hash, self._evaluation):
            self.ledger.close(study, delta=self.site.policy.delta)

    def statement(self) -> dict[str, Any]:
        """What the study has cost, as it goes into the release.

        Where records are protected, what that means for patients with several stands beside it.
        """
        delta = self.study.privacy.delta
        spent = self.ledger.spent_by(self.study.hash, delta)
        evaluation = self.ledger.spent_by(self._evaluation, delta)
        extra: dict[str, Any] = {"not_covered": _ACCEPTANCE} if self.site.policy.judges else {}
        if self.study.monitor is not None:
            alone = privacy_spent(
                gaussian_event(self.plan.monitor_noise), delta=delta, unit=self.study.privacy.unit
            )
            extra["monitor"] = {
                "epsilon_alone": alone.epsilon,
                "noise_multiplier": self.plan.monitor_noise,
                "sensitivity": monitor_sensitivity(self.study),
            }
        recorded = self._recorded(self.study.hash)
        held_out = evaluation.to_json()
        if self.study.privacy.unit == "record":
            release = gaussian_event(self.evaluation_noise)
            extra["patients"] = guarantees_to_json(patient_guarantees(recorded, delta=delta))
            held_out["patients"] = guarantees_to_json(patient_guarantees(release, delta=delta))
        return {
            **extra,
            **spent.to_json(),
            "noise_multiplier": self.plan.noise_multiplier,
            "sample_rate": self.plan.sample_rate,
            "steps": self.plan.steps * self.plan.rounds,
            "event": event_to_json(recorded),
            "held_out_patients": held_out,
            "ledger_head": self.ledger.head,
        }

    @property
    def _evaluation(self) -> str:
        return f"{self.study.hash}/held-out"

    def _whole_run(self) -> DpEvent:
        steps = self._steps(self.plan.steps * self.plan.rounds)
        if self.study.monitor is None:
            return steps
        return compose([steps, gaussian_event(self.plan.monitor_noise)])

    def _steps(self, steps: int) -> DpEvent:
        return dp_sgd_event(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=steps,
        )

    def _recorded(self, study: str) -> DpEvent:
        counted: Leaves = Counter()
        for entry in self.ledger.entries():
            if entry.kind == "reserve" and entry.study == study:
                counted.update(leaves(entry.event))
        return event_of(counted)
