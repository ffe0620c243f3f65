"""A hospital at work: its data, its ledger, its answers to a coordinator.

Everything that must outlast the process is in the site's state folder, so a site may be one
process for a whole run or a new one for each message.
"""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fedward.privacy.ledger import Ledger
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import nn

from fedward.client.admission import check_policy
from fedward.client.plan import SitePlan, plan_site, training_plan
from fedward.client.sources import read_source, split
from fedward.client.training import train
from fedward.core.canonical import canonical_json, digest
from fedward.core.errors import AdmissionRefused, UpdateRejected
from fedward.core.files import write_atomic
from fedward.core.identity import Identity, PublicIdentity
from fedward.core.inbox import receive_release
from fedward.core.site import Site, load_site
from fedward.core.study import Study
from fedward.core.toml import build
from fedward.privacy.accounting import (
    calibrate,
    dp_sgd_event,
    event_to_json,
    gaussian_event,
    privacy_spent,
)
from fedward.privacy.mechanisms import secure_source, simulated_source
from fedward.privacy.mechanisms.noise import NoiseSource
from fedward.strategies.strategy import Vector
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.registry import get_task
from fedward.tasks.task import Examples, Task
from fedward.transport.payload import Payload

_HELD_OUT = "held-out"


@dataclass(frozen=True)
class Admitted:
    """A study that this site admitted, as pinned on its disk."""

    study: Study
    plan: SitePlan


class LocalSite:
    """One hospital. Open it from its site file; then it answers requests.

    Args:
        file: The site file.

    Raises:
        ConfigError: The site file is wrong.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.site: Site = load_site(file)
        self.state = file.parent / self.site.site.state
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._examples: dict[str, tuple[Examples, Examples]] = {}

    # What is on disk

    @cached_property
    def identity(self) -> Identity:
        """The site's Ed25519 identity; made when it is first needed."""
        path = self.state / "identity.pem"
        if not path.exists():
            Identity.generate_site().save(path)
        return Identity.load(path)

    @cached_property
    def ledger(self) -> Ledger:
        """The site's privacy ledger."""
        return Ledger.open(
            self.state / "ledger.sqlite",
            identity=self.identity,
            site=self.site.name,
            simulated=self.site.site.simulated,
        )

    def admitted(self, study_hash: str) -> Admitted:
        """The study with this hash, as it was admitted.

        Raises:
            AdmissionRefused: It was not, so that parameters changed between rounds find no door.
        """
        path = self.state / "admitted" / f"{study_hash[:64]}.json"
        if not study_hash.isalnum() or not path.is_file():
            raise AdmissionRefused(
                site=self.site.name,
                policy="admission",
                reason="this study was not admitted here; the coordinator must send it first",
            )
        record = json.loads(path.read_text(encoding="utf-8"))
        study = build(record["study"], Study, file=str(path))
        return Admitted(study, SitePlan(**record["plan"]))

    # What a coordinator may ask

    def admit(self, request: Payload) -> Payload:
        """Hold a study against policy and budget; pin it, and sign the terms.

        Raises:
            AdmissionRefused: The policy says no.
            BudgetExceeded: The whole run does not fit. Nothing was recorded.
            DataError: The site's data cannot be read as the task needs them.
        """
        study = build(request.record.get("study", {}), Study, file="study of the coordinator")
        if study.hash != request.record.get("hash"):
            raise UpdateRejected(site="coordinator", reason="the study does not have its hash")
        check_policy(self.site, study)
        task = get_task(study.study.task)
        task.model(study.model.name, **study.model.args)
        self.examples(task, study)
        plan = plan_site(study, self.site)
        self._allot(study, plan)
        record = {"study": study.agreed(), "plan": plan.to_json()}
        write_atomic(self.state / "admitted" / f"{study.hash}.json", json.dumps(record, indent=2))
        terms = {
            "site": self.site.name,
            "key": self.identity.public.pem().decode(),
            "hash": study.hash,
            "weight": plan.weight,
            "simulated": self.site.site.simulated,
            "ledger_head": self.ledger.head,
        }
        signature = self.identity.sign(canonical_json(terms)).hex()
        return Payload({"terms": terms, "signature": signature})

    def train(self, request: Payload) -> Payload:
        """Train one round and return the update.

        The budget of the round is reserved on disk before the first step, and settled once the
        update is ready to leave. A coordinator that lost the answer gets the same bytes again,
        which tells it nothing new and costs nothing.

        Raises:
            AdmissionRefused, BudgetExceeded, UpdateRejected: Nothing was trained.
        """
        admitted = self.admitted(str(request.record.get("hash")))
        study, plan = admitted.study, admitted.plan
        round_number = request.record.get("round")
        if not isinstance(round_number, int) or not 1 <= round_number <= plan.rounds:
            raise UpdateRejected(site="coordinator", reason=f"there is no round {round_number}")
        task = get_task(study.study.task)
        model = self._model(task, study, request)
        asked = digest(request.arrays["parameters"].tobytes())
        outbox = self.state / "outbox" / f"{study.hash[:16]}.safetensors"
        update = _resend(outbox, round_number=round_number, asked=asked)
        if update is None:
            update = self._train_once(task, model, admitted, round_number)
            _keep(outbox, update, round_number=round_number, asked=asked)
        return Payload({"site": self.site.name, "round": round_number}, {"update": update})

    def evaluate(self, request: Payload) -> Payload:
        """Metrics of a model on the held-out patients, as sums, and what the run has spent.

        Where the study is private, so are the sums: each held-out patient adds one to one cell
        of a histogram, and Gaussian noise at the study's epsilon covers that. Held-out patients
        never train, so that a patient is in one of the two populations for good.
        """
        admitted = self.admitted(str(request.record.get("hash")))
        study, plan = admitted.study, admitted.plan
        task = get_task(study.study.task)
        model = self._model(task, study, request)
        _, examples = self.examples(task, study)
        exact = evaluate_model(task, model, examples)
        if study.privacy.mode == "none":
            sums, privacy = exact, {"private": False}
        else:
            sums = {
                name: np.asarray(a, np.float64) for name, a in task.private_metrics(exact).items()
            }
            asked = digest(request.arrays["parameters"].tobytes())
            noise_multiplier = self._evaluation_noise(study)
            event = gaussian_event(noise_multiplier)
            name = f"{study.hash}/{_HELD_OUT}"
            reservation = self.ledger.reserve(study=name, round_number=1, event=event)
            source = self._source(study, "evaluation", asked)
            for key in sorted(sums):
                noise = source.gaussian(sums[key].size, std=noise_multiplier)
                sums[key] = sums[key] + noise.reshape(sums[key].shape)
            released = digest(b"".join(sums[key].tobytes() for key in sorted(sums)))
            self.ledger.settle(reservation, update_digest=released)
            self.ledger.close(name)
            self.ledger.close(study.hash)
            privacy = self._spent(study, plan)
        return Payload({"site": self.site.name, "privacy": privacy}, sums)

    def accept_release(self, request: Payload) -> Payload:
        """Verify a release and put it into the store.

        Raises:
            ReleaseRejected, SignatureInvalid: It was not taken; the store is as it was.
        """
        publisher = self.site.serving.publisher
        if publisher is None:
            raise AdmissionRefused(
                site=self.site.name,
                policy="[serving] publisher",
                reason="no publisher's key is pinned here, so no release is taken",
            )
        trusted = PublicIdentity.from_pem((self.file.parent / publisher).read_bytes())
        files = {name: array.tobytes() for name, array in request.arrays.items()}
        store = self.file.parent / self.site.serving.store
        release = receive_release(files, store=store, trusted=trusted)
        return Payload({"site": self.site.name, "version": release.signature.version})

    # How

    def examples(self, task: Task, study: Study) -> tuple[Examples, Examples]:
        """Training and held-out examples, scaled by the schema's public ranges."""
        if study.hash not in self._examples:
            table = read_source(self.site, self.file, task)
            key = self._split_key(study)
            training, held_out = split(table, held_out=self.site.data.held_out, key=key)
            self._examples[study.hash] = (
                task.prepare(training, None),
                task.prepare(held_out, None),
            )
        return self._examples[study.hash]

    def _split_key(self, study: Study) -> bytes:
        if self.site.site.simulated:
            return hashlib.sha256(f"split/{study.study.seed}/{self.site.name}".encode()).digest()
        path = self.state / "split.key"
        if not path.exists():
            write_atomic(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()

    def _source(self, study: Study, *purpose: str | int) -> NoiseSource:
        if self.site.site.simulated:
            return simulated_source(study.study.seed, self.site.name, *purpose)
        return secure_source()

    def _model(self, task: Task, study: Study, request: Payload) -> nn.Module:
        model = task.model(study.model.name, **study.model.args)
        parameters = request.arrays.get("parameters")
        expected = to_vector(model).shape
        if parameters is None or parameters.dtype != np.float32 or parameters.shape != expected:
            raise UpdateRejected(
                site="coordinator", reason=f"its parameters are not float32 of shape {expected}"
            )
        from_vector(model, parameters)
        return model

    def _allot(self, study: Study, plan: SitePlan) -> None:
        if study.privacy.mode == "none":
            return
        policy = self.site.policy
        whole_run = dp_sgd_event(
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.steps * plan.rounds,
        )
        for name, event, population in (
            (study.hash, whole_run, "training"),
            (f"{study.hash}/{_HELD_OUT}", gaussian_event(self._evaluation_noise(study)), _HELD_OUT),
        ):
            self.ledger.allot(
                study=name,
                event=event,
                max_epsilon=policy.max_epsilon,
                delta=policy.delta,
                unit=study.privacy.unit,
                population=population,
            )

    @staticmethod
    def _evaluation_noise(study: Study) -> float:
        return calibrate(
            epsilon=study.privacy.epsilon or 0.0,
            delta=study.privacy.delta,
            sample_rate=1.0,
            steps=1,
        )

    def _train_once(
        self, task: Task, model: nn.Module, admitted: Admitted, round_number: int
    ) -> Vector:
        study, plan = admitted.study, admitted.plan
        examples, _ = self.examples(task, study)
        private = study.privacy.mode != "none"
        reservation = None
        if private:
            event = dp_sgd_event(
                noise_multiplier=plan.noise_multiplier,
                sample_rate=plan.sample_rate,
                steps=plan.steps,
            )
            reservation = self.ledger.reserve(
                study=study.hash, round_number=round_number, event=event
            )
        result = train(
            model,
            task.loss,
            examples,
            plan=training_plan(study, plan),
            noise=self._source(study, "train", round_number),
        )
        if reservation is not None:
            self.ledger.settle(reservation, update_digest=digest(result.update.tobytes()))
        return result.update

    def _spent(self, study: Study, plan: SitePlan) -> dict[str, Any]:
        spent = self.ledger.spent_by(study.hash, delta=study.privacy.delta)
        event = self.ledger.event_of(study.hash)
        evaluation = privacy_spent(
            self.ledger.event_of(f"{study.hash}/{_HELD_OUT}"),
            delta=study.privacy.delta,
            unit=study.privacy.unit,
        )
        return {
            "private": not self.site.site.simulated,
            **spent.to_json(),
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
            "steps": plan.steps * plan.rounds,
            "mechanism": "DP-SGD: Poisson-sampled Gaussian",
            "event": event_to_json(event),
            "held_out_patients": evaluation.to_json(),
            "ledger_head": self.ledger.head,
        }


def evaluate_model(task: Task, model: nn.Module, examples: Examples) -> dict[str, Any]:
    """A model's metrics on examples, as the task's sums."""
    import torch

    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(np.asarray(examples.features)))
    return dict(task.metrics(outputs, torch.from_numpy(np.asarray(examples.labels))))


def _resend(outbox: Path, *, round_number: int, asked: str) -> Vector | None:
    if not outbox.is_file():
        return None
    arrays = load_arrays(outbox.read_bytes())
    key = f"{round_number}/{asked}"
    return arrays.get(key)


def _keep(outbox: Path, update: Vector, *, round_number: int, asked: str) -> None:
    # Not flushed: a power cut loses the copy, and then the round is paid for again.
    outbox.parent.mkdir(parents=True, exist_ok=True)
    temporary = outbox.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(save_arrays({f"{round_number}/{asked}": update}))
    temporary.replace(outbox)
