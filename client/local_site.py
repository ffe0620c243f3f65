"""A hospital on its own disk: site file, identity, ledger, admitted studies, data.

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

import numpy as np
from torch import nn

from fedward.client.budget import Budget
from fedward.client.clipping import ClipNorms
from fedward.client.devices import choose_device
from fedward.client.objective import study_loss
from fedward.client.outbox import Keeper, Outbox
from fedward.client.plan import SitePlan, training_plan
from fedward.client.progress import Progress
from fedward.client.sources import read_source, split
from fedward.client.training import LocalResult, TrainingPlan, train
from fedward.core.canonical import digest
from fedward.core.errors import AdmissionRefused, UpdateRejected
from fedward.core.files import alone_in, write_atomic
from fedward.core.identity import Identity, PublicIdentity
from fedward.core.roster import load_roster
from fedward.core.site import Site, load_site
from fedward.core.study import Study
from fedward.core.toml import build
from fedward.privacy.ledger import Ledger, Reservation
from fedward.privacy.ledger.simulated import take_out
from fedward.privacy.mechanisms import NoiseSource, secure_source, simulated_source
from fedward.privacy.secagg import SiteSession
from fedward.strategies.strategy import Vector
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Examples, Table, Task
from fedward.transport.sums import clip_by_norm

ZEROED = "zeroed.jsonl"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A study that this site admitted, as pinned on its disk."""

    study: Study
    plan: SitePlan


class LocalSite:
    """One hospital. Open it from its site file.

    Args:
        file: The site file.

    Raises:
        ConfigError: The site file is wrong, or asks for a device that is not here.
    """

    def __init__(self, file: Path, *, site: Site | None = None) -> None:
        self.file = file
        self.site: Site = site or load_site(file)
        self._admitted: dict[str, Admitted] = {}
        self._examples: dict[str, tuple[Examples, Examples]] = {}
        self.sessions: dict[str, tuple[str, SiteSession]] = {}
        self._sizes: dict[str, int] = {}
        self.device = choose_device(
            self.site.site.device, file=str(file), simulated=self.site.site.simulated
        )
        self._open_state()

    def _open_state(self) -> None:
        """Make the state folder; a simulated site's part of a common file is taken out into it."""
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        ledgers = self.site.site.ledgers
        if self.simulated and ledgers is not None:
            take_out(self.file.parent / ledgers, self.name, state=self.state)

    @property
    def state(self) -> Path:
        """The folder of all that must outlast the process."""
        return self.file.parent / self.site.site.state

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def simulated(self) -> bool:
        """Whether it draws from the study's seed, so that nothing of it is private."""
        return self.site.site.simulated

    @cached_property
    def identity(self) -> Identity:
        """The site's Ed25519 identity; made when it is first needed."""
        path = self.state / "identity.pem"
        if not path.exists():
            with alone_in(self.state):
                if not path.exists():
                    Identity.generate_site().save(path)
        return Identity.load(path)

    @cached_property
    def ledger(self) -> Ledger:
        """The site's privacy ledger."""
        return Ledger.open(
            self.state / "ledger.sqlite",
            identity=self.identity,
            site=self.name,
            simulated=self.simulated,
        )

    def pin(self, admitted: Admitted) -> None:
        """Keep an admitted study: from now on its hash is enough, and nothing of it changes."""
        record = {"study": admitted.study.agreed(), "plan": admitted.plan.to_json()}
        text = json.dumps(record, indent=2)
        write_atomic(self.state / "admitted" / f"{admitted.study.hash}.json", text)

    def admitted(self, study_hash: str) -> Admitted:
        """The study with this hash, as it was admitted.

        Raises:
            AdmissionRefused: It was not: parameters that change between rounds find no door.
        """
        if study_hash not in self._admitted:
            path = self.state / "admitted" / f"{study_hash}.json"
            if not study_hash.isalnum() or not path.is_file():
                raise AdmissionRefused(
                    site=self.name,
                    policy="admission",
                    reason="this study was not admitted here; the coordinator must send it first",
                )
            record = json.loads(path.read_text(encoding="utf-8"))
            study = build(record["study"], Study, file=str(path))
            self._admitted[study_hash] = Admitted(study, SitePlan(**record["plan"]))
        return self._admitted[study_hash]

    def roster(self) -> dict[str, PublicIdentity] | None:
        """The consortium's roster as this site pins it; None if its policy names none."""
        path = self.site.policy.roster
        return None if path is None else load_roster(self.file.parent / path)

    def session_file(self, study: Study) -> Path:
        """Where the keys of the study's secure aggregation lie, for this site's eyes only."""
        return self.state / "secagg" / f"{study.hash}.json"

    def budget(self, admitted: Admitted) -> Budget:
        """The private study's account in the ledger."""
        return Budget(self.site, admitted.study, admitted.plan, self.ledger)

    def outbox(self, study: Study) -> Keeper:
        """The study's outbox."""
        return Outbox(self.state / "outbox" / f"{study.hash}.safetensors")

    def metrics_outbox(self, study: Study) -> Keeper:
        """The outbox of the study's one release of metrics."""
        return Outbox(self.state / "outbox" / f"{study.hash}-metrics.safetensors")

    def monitor_outbox(self, study: Study) -> Keeper:
        """The outbox of the study's one release of histograms."""
        return Outbox(self.state / "outbox" / f"{study.hash}-monitor.safetensors")

    def examples(self, task: Task, study: Study) -> tuple[Examples, Examples]:
        """Training and held-out examples, scaled by the schema's public ranges.

        Raises:
            DataError: The site's data cannot be read as the task needs them.
        """
        if study.hash not in self._examples:
            training, held_out = (task.prepare(part, None) for part in self.tables(task, study))
            if study.privacy.unit == "record":
                # What is sampled, and clipped as one vector, is what the guarantee is for.
                training = training.by_record()
            self._examples[study.hash] = training, held_out
        return self._examples[study.hash]

    def tables(self, task: Task, study: Study) -> tuple[Table, Table]:
        """Training and held-out patients in the schema's units, read again: neither is kept.

        Raises:
            DataError: The site's data cannot be read as the task needs them.
        """
        table = read_source(self.site, self.file, task)
        return split(table, held_out=self.site.data.held_out, key=self._split_key(study))

    def source(self, study: Study, *purpose: str | int) -> NoiseSource:
        """Where randomness comes from: a cryptographic stream, or in simulation the seed."""
        if self.simulated:
            return simulated_source(*self.seed(study, *purpose))
        return secure_source()

    def seed(self, study: Study, *purpose: str | int) -> tuple[str | int, ...]:
        """What a simulated site's source for a purpose is made of."""
        return (study.study.seed, self.name, *purpose)

    def model(self, study: Study, parameters: Vector | None) -> tuple[Task, nn.Module]:
        """The study's task, and its model with these parameters.

        Raises:
            UpdateRejected: The parameters are not a vector of the model's size.
        """
        task = get_task(study.study.task)
        model = study_model(study, task)
        from_vector(model, self.check_parameters(study, parameters))
        return task, model

    def progress(self, study: Study, paid: Reservation, parameters: Vector) -> Progress | None:
        """How far a reservation's training is; None where a seed gives the same one again."""
        if self.simulated:
            return None
        file = self.state / "training" / f"{study.hash}.safetensors"
        return Progress(file, paid.seq, self.fingerprint(parameters))

    def train(
        self,
        admitted: Admitted,
        parameters: Vector,
        *,
        round_number: int,
        paid: Reservation | None = None,
    ) -> Vector:
        """Train a round from parameters that were checked; the update, as it may be kept.

        Where it was `paid` for and stopped before, it goes on from there.
        """
        study = admitted.study
        task, model = self.model(study, parameters)
        model.to(self.device)
        training, _ = self.examples(task, study)
        plan = self.round_plan(admitted, round_number)
        noise = self.source(study, "train", round_number)
        progress = None if paid is None else self.progress(study, paid, parameters)
        result = train(
            model,
            study_loss(study, task),
            training,
            plan=plan,
            noise=noise,
            resume=None if progress is None else progress.newest(),
            checkpoint=None if progress is None else progress.keep,
        )
        self.end_round(admitted, round_number, result)
        return result.update

    def round_plan(self, admitted: Admitted, round_number: int) -> TrainingPlan:
        """What the trainer is told for a round; adaptive clipping goes on where it stood."""
        norms = self._clip_norms(admitted.study)
        start = None if norms is None else norms.before(round_number)
        return training_plan(admitted.study, admitted.plan, round_number=round_number, start=start)

    def end_round(self, admitted: Admitted, round_number: int, result: LocalResult) -> None:
        """Keep what the next round goes on from."""
        norms = self._clip_norms(admitted.study)
        if norms is not None:
            norms.keep(round_number, result.clip_norm)

    def _clip_norms(self, study: Study) -> ClipNorms | None:
        if study.privacy.clipping == "fixed":
            return None
        file = self.state / "clipping" / f"{study.hash}.json"
        return ClipNorms(file, durable=not self.simulated)

    def note_zeroed(self, study: Study, round_number: int) -> None:
        """Add a line to the site's `zeroed.jsonl`: a round's update was not finite, and was zero.

        For the site's own people; outside it would be a fact about its patients.
        """
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        line = json.dumps({"study": study.hash, "round": round_number}) + "\n"
        descriptor = os.open(self.state / ZEROED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(line)

    def outgoing(self, study: Study, update: Vector) -> Vector:
        """What leaves of an update: no more than the study's clip norm, where it has one."""
        return clip_by_norm(update, clip_norm=study.aggregation.clip_norm)

    def size(self, study: Study) -> int:
        """Number of parameters of the study's model."""
        if study.hash not in self._sizes:
            model = study_model(study, get_task(study.study.task))
            self._sizes[study.hash] = to_vector(model).size
        return self._sizes[study.hash]

    def check_parameters(self, study: Study, parameters: Vector | None) -> Vector:
        """Hold a coordinator's parameters against the study's model.

        Raises:
            UpdateRejected: They are not a vector of the model's size.
        """
        size = self.size(study)
        if parameters is None or parameters.dtype != np.float32 or parameters.shape != (size,):
            raise UpdateRejected(
                site="coordinator", reason=f"its parameters are not float32 of shape {(size,)}"
            )
        return parameters

    def fingerprint(self, parameters: Vector) -> str:
        """SHA-256 of the parameters that a round starts from."""
        return digest(parameters.tobytes())

    def _split_key(self, study: Study) -> bytes:
        if self.simulated:
            # A patient who is at several simulated sites is on the same side at all of them.
            shared = self.site.data.source == "embedded" and self.site.data.path is not None
            return simulated_split_key(study, "" if shared else self.name)
        path = self.state / "split.key"
        if not path.exists():
            with alone_in(self.state):
                if not path.exists():
                    write_atomic(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()


def simulated_split_key(study: Study, site: str) -> bytes:
    """The key by which a simulated site holds patients out: of the study's seed."""
    return hashlib.sha256(f"split/{study.study.seed}/{site}".encode()).digest()
