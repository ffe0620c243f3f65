"""How a simulation's coordinator reaches its sites: one by one through Flower, or as one batch.

Admission, ledger and every check are the site's own code either way. A batch is not a message,
so training as one batch goes past Flower; everything else goes through it.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from fedward.client.answers import Round, begin_round, finish_round, verify_release
from fedward.client.local_site import LocalSite
from fedward.client.objective import study_loss
from fedward.client.plan import training_plan
from fedward.core.errors import AdmissionRefused, FedwardError
from fedward.core.study import Study
from fedward.privacy.mechanisms import NoiseSource
from fedward.privacy.mechanisms.sources import SimulatedSource, simulated_sources
from fedward.server.channel import Channel, Reply
from fedward.simulations.cohort import Cohort, CohortSite, Turn
from fedward.simulations.engines import Choice, choose_engine
from fedward.simulations.sites import PartitionSite
from fedward.strategies.strategy import Vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.transport.payload import Payload

ADMIT, TRAIN, PUBLISH = "query.admit", "train.update", "query.publish"
_WINDOW = 128
_MESSAGES = 256

Log = Callable[..., None]


class CohortChannel:
    """A `Channel` whose sites train as one batch where that is faster.

    Args:
        flower: The way through Flower.
        sites: By node number.
        study: The study.
        log: Takes an event; told once which engine was chosen, and why.
    """

    def __init__(
        self, flower: Channel, sites: Mapping[int, LocalSite], *, study: Study, log: Log
    ) -> None:
        self._flower, self._sites, self._study, self._log = flower, sites, study, log
        self._choice: Choice | None = None
        self._cohort: Cohort | None = None
        self._numbers: dict[int, int] = {}
        self._spent: Sequence[SimulatedSource] = ()

    def node_ids(self) -> list[int]:
        """All nodes."""
        return self._flower.node_ids()

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """As `Channel`."""
        if kind == TRAIN and self._vectorised():
            yield from self._train(payloads)
            return
        if round_number > self._study.study.rounds:
            self._cohort, self._spent = None, ()  # nobody trains any more: make room
        # A few at a time: of ten thousand sites neither all messages nor all answers are at once.
        nodes = list(payloads)
        for start in range(0, len(nodes), _MESSAGES):
            few = {node: payloads[node] for node in nodes[start : start + _MESSAGES]}
            yield from self._flower.ask(kind, few, round_number=round_number, deadline=deadline)

    def _vectorised(self) -> bool:
        if self._choice is None:
            study = self._study
            task = get_task(study.study.task)
            model = study_model(study, task)
            members = self._members()
            self._choice = choose_engine(study, model, sites=len(members))
            if self._choice.engine == "vectorised":
                self._numbers = {node: number for number, node in enumerate(members)}
                self._cohort = Cohort(
                    model,
                    study_loss(study, task),
                    _AsAsked(self._cohort_site, [self._sites[node] for node in members]),
                    device=torch.device(study.simulation.device),
                )
            self._log("engine", engine=self._choice.engine, why=self._choice.why)
        return self._choice.engine == "vectorised"

    def _members(self) -> list[int]:
        found = []
        for node, site in self._sites.items():
            try:
                site.admitted(self._study.hash)
            except AdmissionRefused:
                continue
            found.append(node)
        return found

    def _cohort_site(self, site: LocalSite) -> CohortSite:
        admitted = site.admitted(self._study.hash)
        training, _ = site.examples(get_task(self._study.study.task), self._study)
        return CohortSite(training, training_plan(self._study, admitted.plan, round_number=1))

    def _train(self, payloads: Mapping[int, Payload]) -> Iterator[Reply]:
        nodes = list(payloads)
        for start in range(0, len(nodes), _WINDOW):
            yield from self._window({n: payloads[n] for n in nodes[start : start + _WINDOW]})

    def _window(self, payloads: Mapping[int, Payload]) -> Iterator[Reply]:
        """Reserve for every site, train them together, settle for every site."""
        begun: dict[int, Round | str] = {}
        for node, payload in payloads.items():
            try:
                begun[node] = begin_round(self._sites[node], payload)
            except FedwardError as error:
                begun[node] = str(error)
        todo = [n for n, r in begun.items() if isinstance(r, Round) and r.again is None]
        updates = self._updates({node: begun[node] for node in todo})
        # All settle before one answer leaves, as they would if the coordinator went away now.
        yield from [
            Reply(node, None, state)
            if isinstance(state, str)
            else self._finish(node, state, updates)
            for node, state in begun.items()
        ]

    def _finish(self, node: int, begun: Round, updates: Iterator[Vector]) -> Reply:
        update = begun.again if begun.again is not None else next(updates)
        try:
            return Reply(node, finish_round(self._sites[node], begun, update))
        except FedwardError as error:
            return Reply(node, None, str(error))

    def _updates(self, begun: Mapping[int, Any]) -> Iterator[Any]:
        if not begun or self._cohort is None:
            return
        first: Round = next(iter(begun.values()))
        sources = _Sources(
            [self._sites[node] for node in begun],
            (self._study, "train", first.number),
            spent=self._spent,
        )
        turns = [
            Turn(self._numbers[node], partial(sources.of, place))
            for place, node in enumerate(begun)
        ]
        updates = list(self._cohort.train(first.parameters, turns))
        self._spent = sources.spent()
        yield from updates


class _AsAsked(Sequence[CohortSite]):
    """What a cohort needs of each site, made when it is asked for: thousands are never at once."""

    def __init__(self, make: Callable[[LocalSite], CohortSite], sites: list[LocalSite]) -> None:
        self._make, self._sites = make, sites

    @overload
    def __getitem__(self, place: int) -> CohortSite: ...
    @overload
    def __getitem__(self, place: slice) -> "_AsAsked": ...
    def __getitem__(self, place: int | slice) -> "CohortSite | _AsAsked":
        if isinstance(place, slice):
            return _AsAsked(self._make, self._sites[place])
        return self._make(self._sites[place])

    def __len__(self) -> int:
        return len(self._sites)


class _Sources:
    """Where the sites of a window draw from; those of simulated sites are made all at once.

    Nothing is made before somebody asks: where nothing is drawn nobody does.
    """

    def __init__(
        self,
        sites: Sequence[LocalSite],
        purpose: tuple[Study, str, int],
        *,
        spent: Sequence[SimulatedSource],
    ) -> None:
        self._sites, self._purpose, self._unused = sites, purpose, spent
        self._made: Sequence[SimulatedSource] = ()
        self._together = all(site.simulated for site in sites)

    def of(self, place: int) -> NoiseSource:
        """The source of the site in this place."""
        if not self._together:
            return self._sites[place].source(*self._purpose)
        if not self._made:
            seeds = [site.seed(*self._purpose) for site in self._sites]
            self._made = simulated_sources(seeds, spent=self._unused)
        return self._made[place]

    def spent(self) -> Sequence[SimulatedSource]:
        """Sources that nobody will draw from again."""
        return self._made or self._unused


class MemoryChannel:
    """A `Channel` for sites whose state is in memory.

    Their books are kept once a round is answered, before its answers are used; a release is
    verified once for all, and put into no store.

    Args:
        inner: What answers.
        sites: By node number.
        keep: Keeps the books.
    """

    def __init__(
        self, inner: Channel, sites: Mapping[int, LocalSite], *, keep: Callable[[], None]
    ) -> None:
        self._inner, self._sites, self._keep = inner, sites, keep

    def node_ids(self) -> list[int]:
        """All nodes."""
        return self._inner.node_ids()

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """As `Channel`; a round ends once all is kept."""
        storeless = {n for n in payloads if isinstance(self._sites[n], PartitionSite)}
        if kind == PUBLISH and storeless:
            yield from self._verify(payloads, storeless, round_number, deadline)
            return
        yield from self._inner.ask(kind, payloads, round_number=round_number, deadline=deadline)
        if kind == TRAIN:
            self._keep()

    def _verify(
        self, payloads: Mapping[int, Payload], storeless: set[int], number: int, deadline: float
    ) -> Iterator[Reply]:
        first = min(storeless)
        others = {n: p for n, p in payloads.items() if n not in storeless}
        answers = self._inner.ask(PUBLISH, others, round_number=number, deadline=deadline)
        replies = {reply.node_id: reply for reply in answers}
        try:
            with tempfile.TemporaryDirectory(prefix="fedward-release-") as folder:
                version = verify_release(self._sites[first], payloads[first], store=Path(folder))
        except FedwardError as error:
            for node in payloads:
                yield replies.get(node) or Reply(node, None, str(error))
            return
        for node in payloads:
            said = Payload({"site": self._sites[node].name, "version": version})
            yield replies.get(node) or Reply(node, said)
