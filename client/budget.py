"""What a study may cost here, and has: between the study, the plan and the ledger."""

from dataclasses import dataclass
from typing import Any

from fedward.client.plan import SitePlan
from fedward.core.site import Site
from fedward.core.study import Study
from fedward.privacy.accounting import (
    DpEvent,
    PrivacySpent,
    calibrate_gaussian,
    compose,
    dp_sgd_event,
    event_to_json,
    gaussian_event,
    privacy_spent,
)
from fedward.privacy.accounting.events import event_of, inside_a_site, leaves
from fedward.privacy.ledger import Ledger, Reservation
from fedward.privacy.units import guarantees_to_json, patient_guarantees, patient_of_a_site
from fedward.transport.monitor import metrics_sensitivity, monitor_round, monitor_sensitivity

_EVALUATION_ROUND = 1
_ACCEPTANCE = "whether the site takes the release: one word about its held-out patients"


@dataclass(frozen=True, slots=True)
class Budget:
    """One private study at one site.

    Training patients and held-out patients are two populations that no patient is both of, so
    each has the study's whole epsilon; see docs/privacy.md. A site is both, so where sites are
    protected nothing of held-out patients is released.
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
        if self.study.protects_sites:
            return
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
        event = self._rounds(1)
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
        studies = (self.study.hash, self._evaluation)
        for study in studies[:1] if self.study.protects_sites else studies:
            self.ledger.close(study, delta=self.site.policy.delta)

    @property
    def is_open(self) -> bool:
        """Whether the study may still spend."""
        return self.ledger.is_open(self.study.hash)

    def statement(self) -> dict[str, Any]:
        """What the study has cost, as it goes into the release.

        Where records are protected, what that means for patients with several stands beside it;
        where sites are, what it means for one of their patients.
        """
        delta = self.study.privacy.delta
        spent = self.ledger.spent_by(self.study.hash, delta)
        if self.study.protects_sites:
            return self._statement_of_site(spent)
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
        recorded = event_of(self.ledger.reserved(self.study.hash))
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

    def _statement_of_site(self, spent: PrivacySpent) -> dict[str, Any]:
        recorded = event_of(self.ledger.reserved(self.study.hash))
        patient = patient_of_a_site(recorded, delta=self.study.privacy.delta)
        extra = {"not_covered": _ACCEPTANCE} if self.site.policy.judges else {}
        return {
            **extra,
            **spent.to_json(),
            # Each round is one release of everything: no sampling.
            "noise_multiplier": self.plan.noise_multiplier,
            "sample_rate": 1.0,
            "steps": self.plan.rounds,
            "event": event_to_json(recorded),
            "patient": {
                **patient.to_json(),
                "noise_multiplier": self.plan.noise_multiplier / 2,
                "event": event_to_json(event_of(inside_a_site(leaves(recorded)))),
            },
            "ledger_head": self.ledger.head,
        }

    @property
    def _evaluation(self) -> str:
        return f"{self.study.hash}/held-out"

    def _whole_run(self) -> DpEvent:
        training = self._rounds(self.plan.rounds)
        if self.study.monitor is None:
            return training
        return compose([training, gaussian_event(self.plan.monitor_noise)])

    def _rounds(self, rounds: int) -> DpEvent:
        if self.study.protects_sites:
            # However many steps a round has: its one release is of the whole update.
            return dp_sgd_event(
                noise_multiplier=self.plan.noise_multiplier, sample_rate=1.0, steps=rounds
            )
        steps = self.plan.steps * rounds
        return dp_sgd_event(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=steps,
        )
