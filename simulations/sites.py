"""Simulated sites: the site's own code, with its state in memory and shared among thousands."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedward.client.budget import Budget
from fedward.client.local_site import Admitted, LocalSite, simulated_split_key
from fedward.client.objective import study_loss
from fedward.client.outbox import Keeper, Kept
from fedward.client.plan import training_plan
from fedward.client.sources import split
from fedward.client.training import TrainingPlan
from fedward.client.training.sampler import PoissonSampler
from fedward.client.training.trainer import Trainer
from fedward.core.errors import AdmissionRefused
from fedward.core.identity import Identity
from fedward.core.run import RunDirectory
from fedward.core.site import Site
from fedward.core.study import Study
from fedward.privacy.ledger import Ledger, Reservation
from fedward.privacy.ledger.simulated import SimulatedLedgers
from fedward.simulations.partitions import read_rows
from fedward.simulations.provision import LEDGERS
from fedward.simulations.scenarios import Scenario
from fedward.strategies.strategy import Vector
from fedward.tasks import datasets
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Examples, Table, Task


class SimulatedSite(LocalSite):
    """A site on disk to which things happen: poisoned data, crashes.

    Args:
        file: The site file.
        scenario: What happens to whom.
        site: The file's content, where it is known.
    """

    def __init__(self, file: Path, scenario: Scenario, *, site: Site | None = None) -> None:
        self._scenario = scenario
        self._poisoned: dict[str, tuple[Examples, Examples]] = {}
        super().__init__(file, site=site)

    def examples(self, task: Task, study: Study) -> tuple[Examples, Examples]:
        """As a site's; a malicious one may train on poisoned data, and holds out clean ones."""
        if study.hash not in self._poisoned:
            training, held_out = self._clean_examples(task, study)
            self._poisoned[study.hash] = self._scenario.poison(self.name, training), held_out
        return self._poisoned[study.hash]

    def _clean_examples(self, task: Task, study: Study) -> tuple[Examples, Examples]:
        return super().examples(task, study)

    def outgoing(self, study: Study, update: Vector) -> Vector:
        """As a site's; a malicious one may send something else, masked like any update."""
        return self._scenario.outgoing(self.name, super().outgoing(study, update))


class MemorySite(SimulatedSite):
    """A simulated site that writes nothing to disk.

    Args:
        file: The site file.
        scenario: What happens to whom.
        shared: What the sites of a run have in common.
        site: The file's content, where it is known.
    """

    def __init__(
        self, file: Path, scenario: Scenario, shared: "Shared", *, site: Site | None = None
    ) -> None:
        self._shared = shared
        self._outboxes: dict[str, MemoryOutbox] = {}
        self._budget: Budget | None = None
        self._rounds: dict[str, tuple[PoissonSampler, TrainingPlan]] = {}
        self._quiet = scenario.quiet
        super().__init__(file, scenario, site=site)
        self._sizes = shared.sizes

    def _open_state(self) -> None:
        """Nothing is on disk."""

    @property
    def identity(self) -> Identity:
        """Kept with the ledgers, and made of its key each time: thousands need not be at once."""
        return self._shared.ledgers.identity(self.name)

    @cached_property
    def ledger(self) -> Ledger:
        """In memory, with those of the other sites."""
        return self._shared.ledgers.open(self.name)[1]

    def model(self, study: Study, parameters: Vector | None) -> tuple[Task, nn.Module]:
        """As a site's; one model serves all sites, each in its turn."""
        checked = self.check_parameters(study, parameters)
        task, model = self._shared.model(study)
        from_vector(model, checked)
        return task, model

    def train(
        self,
        admitted: Admitted,
        parameters: Vector,
        *,
        round_number: int,
        paid: Reservation | None = None,  # noqa: ARG002 (the seed gives a lost round again)
    ) -> Vector:
        """As a site's; one model, laid out once, serves all sites, each in its turn."""
        study = admitted.study
        trainer = self._shared.trainer(study, self.device)
        if study.hash not in self._rounds:
            training, _ = self.examples(get_task(study.study.task), study)
            plan = training_plan(study, admitted.plan, round_number=1)
            self._rounds[study.hash] = trainer.sampler(training, plan), plan
        sampler, plan = self._rounds[study.hash]
        if plan.schedule != "constant" or study.privacy.clipping != "fixed":
            plan = self.round_plan(admitted, round_number)
        noise = partial(self.source, study, "train", round_number)
        result = trainer.train(parameters, sampler, plan, noise=noise)
        self.end_round(admitted, round_number, result)
        return result.update

    def pin(self, admitted: Admitted) -> None:
        """Keep an admitted study; after a restart the coordinator sends it again."""
        self._admitted[admitted.study.hash] = admitted

    def admitted(self, study_hash: str) -> Admitted:
        """The study with this hash, as it was admitted. Raises `AdmissionRefused`."""
        found = self._admitted.get(study_hash)
        if found is None:
            raise AdmissionRefused(
                site=self.name,
                policy="admission",
                reason="this study was not admitted here; the coordinator must send it first",
            )
        return found

    def budget(self, admitted: Admitted) -> Budget:
        """As a site's, made once."""
        known = self._budget
        if known is None or known.study is not admitted.study:
            known = self._budget = super().budget(admitted)
        return known

    def outbox(self, study: Study) -> Keeper:
        """Keeps nothing of a round, as the seed gives the same update again.

        It does so among the same sites of a batch. Where some may be away when a void round is
        tried again, the update is kept.
        """
        if self._quiet:
            return _EMPTY
        return self._outboxes.setdefault(study.hash, MemoryOutbox(keeps=True))

    def metrics_outbox(self, study: Study) -> Keeper:
        """The outbox of the study's one release of metrics."""
        return self._outboxes.setdefault(f"{study.hash}-metrics", MemoryOutbox(keeps=True))

    def monitor_outbox(self, study: Study) -> Keeper:
        """The outbox of the study's one release of histograms."""
        return self._outboxes.setdefault(f"{study.hash}-monitor", MemoryOutbox(keeps=True))

    def check_parameters(self, study: Study, parameters: Vector | None) -> Vector:
        """As a site's; what was checked for one site is good for the others."""
        if parameters is not None and self._shared.checked is parameters:
            return parameters
        checked = super().check_parameters(study, parameters)
        self._shared.checked = checked
        return checked

    def fingerprint(self, parameters: Vector) -> str:
        """As a site's; taken once of what all sites are sent."""
        known = self._shared.fingerprint
        if known is None or known[0] is not parameters:
            known = parameters, super().fingerprint(parameters)
            self._shared.fingerprint = known
        return known[1]


class PartitionSite(MemorySite):
    """A site of a partition: its data are rows of a table that all share; it has no store."""

    def examples(self, task: Task, study: Study) -> tuple[Examples, Examples]:
        """As a site's; taken from the table each time, which is quick, and kept nowhere."""
        training, held_out = self._clean_examples(task, study)
        return self._scenario.poison(self.name, training), held_out

    def _clean_examples(self, task: Task, study: Study) -> tuple[Examples, Examples]:
        return self._shared.examples(task, study, self)

    def tables(self, task: Task, study: Study) -> tuple[Table, Table]:
        """As a site's, of the pooled data."""
        return self._shared.tables(task, study, self)


class MemoryOutbox:
    """An outbox that is no file.

    Args:
        keeps: Whether it keeps anything.
    """

    __slots__ = ("_keeps", "_kept")

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self._kept: Kept | None = None

    def keep(self, kept: Kept) -> None:
        """Keep it as long as the process lives."""
        if self._keeps:
            self._kept = kept

    def newest(self) -> Kept | None:
        """What was kept last."""
        return self._kept


_EMPTY = MemoryOutbox(keeps=False)


class _Trainers(threading.local):
    """Of each thread its own: a trainer trains one site at a time."""

    def __init__(self) -> None:
        self.by_study: dict[str, Trainer] = {}


class Shared:
    """What the simulated sites of a run have in common: books, and tables read once.

    Args:
        ledgers: Where their ledgers are.
    """

    def __init__(self, ledgers: SimulatedLedgers) -> None:
        self.ledgers = ledgers
        self.sizes: dict[str, int] = {}
        self.checked: Vector | None = None
        self.fingerprint: tuple[Vector, str] | None = None
        self._rows: dict[Path, dict[str, NDArray[np.int64]]] = {}
        self._models: dict[str, tuple[Task, nn.Module]] = {}
        self._trainers = _Trainers()
        self._prepared: dict[tuple[str, str], tuple[Table, Examples, NDArray[np.bool_]]] = {}

    def model(self, study: Study) -> tuple[Task, nn.Module]:
        """The study's task and a model, made once."""
        if study.hash not in self._models:
            task = get_task(study.study.task)
            self._models[study.hash] = task, study_model(study, task)
        return self._models[study.hash]

    def trainer(self, study: Study, device: torch.device) -> Trainer:
        """This thread's trainer of the study, on a model that nobody else uses.

        Args:
            study: What is trained.
            device: Where; the sites of a run have the same.
        """
        trainers = self._trainers.by_study
        if study.hash not in trainers:
            task = get_task(study.study.task)
            model = study_model(study, task)
            model.to(device)
            trainers[study.hash] = Trainer(model, study_loss(study, task))
        return trainers[study.hash]

    def examples(self, task: Task, study: Study, site: LocalSite) -> tuple[Examples, Examples]:
        """A site's training and held-out examples, from the pooled data prepared once."""
        _, prepared, side, rows = self._pooled(task, study, site)
        here = side[rows]
        training = prepared.take(rows[~here])
        if study.privacy.unit == "record":
            training = training.by_record()
        return training, prepared.take(rows[here])

    def tables(self, task: Task, study: Study, site: LocalSite) -> tuple[Table, Table]:
        """A site's training and held-out patients, from the pooled data."""
        table, _, side, rows = self._pooled(task, study, site)
        here = side[rows]
        return table.take(rows[~here]), table.take(rows[here])

    def _pooled(
        self, task: Task, study: Study, site: LocalSite
    ) -> tuple[Table, Examples, NDArray[np.bool_], NDArray[np.int64]]:
        """The pooled data, prepared; which rows are held out; and which are the site's."""
        file = site.file.parent / str(site.site.data.path)
        if file not in self._rows:
            self._rows[file] = read_rows(file)
        rows = self._rows[file][str(site.site.data.partition)]
        dataset = str(site.site.data.dataset)
        share = site.site.data.held_out
        key = f"{study.hash}/{dataset}", f"{share}"
        if key not in self._prepared:
            table = datasets.pooled(dataset)
            _, held_out = split(table, held_out=share, key=simulated_split_key(study, ""))
            out = set(held_out.patient_ids)
            side = np.array([patient_id in out for patient_id in table.patient_ids])
            self._prepared[key] = table, task.prepare(table, None), side
        return *self._prepared[key], rows


class LocalSites(Mapping[Path, LocalSite]):
    """A run's sites by site file, in the order of node numbers.

    Args:
        sites: The sites.
        ledgers: Where those in memory have their books; None where there are none.
    """

    def __init__(self, sites: Mapping[Path, LocalSite], ledgers: SimulatedLedgers | None) -> None:
        self._sites, self._ledgers = sites, ledgers

    def __getitem__(self, file: Path) -> LocalSite:
        """The site of a site file."""
        return self._sites[file]

    def __iter__(self) -> Iterator[Path]:
        """The site files."""
        return iter(self._sites)

    def __len__(self) -> int:
        """How many."""
        return len(self._sites)

    def keep(self) -> None:
        """Write what is new in the books of sites in memory."""
        if self._ledgers is not None:
            self._ledgers.save()


@contextmanager
def open_sites(
    run: RunDirectory, files: Mapping[Path, Site], scenario: Scenario
) -> Iterator[LocalSites]:
    """Open every site: in memory where it is simulated and says so, else on disk."""
    together = run.path.resolve() / LEDGERS
    in_memory = {f for f, s in files.items() if s.site.simulated and s.site.ledgers is not None}
    ledgers = SimulatedLedgers(together) if in_memory else None
    shared = Shared(ledgers) if ledgers is not None else None
    sites: dict[Path, LocalSite] = {}
    for file, site in files.items():
        if shared is None or file not in in_memory:
            sites[file] = SimulatedSite(file, scenario, site=site)
        elif site.data.source == "embedded" and site.data.path is not None:
            sites[file] = PartitionSite(file, scenario, shared, site=site)
        else:
            sites[file] = MemorySite(file, scenario, shared, site=site)
    try:
        yield LocalSites(sites, ledgers)
    finally:
        if ledgers is not None:
            ledgers.shut()
