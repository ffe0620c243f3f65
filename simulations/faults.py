"""A scenario on the way between coordinator and sites: away, late, crashed, hostile."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Context

from fedward.core.errors import AggregationAborted
from fedward.core.run import RunDirectory
from fedward.server.app import run_study
from fedward.server.channel import Channel, Reply
from fedward.simulations.attacks import forge
from fedward.simulations.channel import ADMIT, TRAIN, Log
from fedward.simulations.scenarios import Scenario
from fedward.strategies.strategy import Vector
from fedward.transport.payload import Payload

_IN_A_ROUND = {TRAIN, "train.shares", "train.confirm", "train.unmask"}
_AWAY = "it cannot be reached"
_MOST_VOID = 20  # in a row; then the study asks for more sites than its dropouts leave


class CoordinatorCrashed(Exception):
    """The scenario's coordinator is gone; it goes on from its checkpoint.

    Not one of Fedward's errors: a coordinator that crashes explains nothing.
    """


class RetryingChannel:
    """A `Channel` that asks a node again if its process failed.

    A site that paid for a round and did not finish it pays again, within its limit.

    Args:
        inner: What answers.
        retries: How often to ask again.
        log: Takes an event for each failure.
    """

    def __init__(self, inner: Channel, *, retries: int, log: Log) -> None:
        self._inner, self._retries, self._log = inner, retries, log

    def node_ids(self) -> list[int]:
        """All nodes."""
        return self._inner.node_ids()

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """As `Channel`."""
        for first in self._inner.ask(kind, payloads, round_number=round_number, deadline=deadline):
            reply = first
            for number in range(1, self._retries + 1):
                if not reply.lost:
                    break
                self._log(
                    "retried",
                    round=round_number,
                    node=str(reply.node_id),
                    reason=f"try {number} of {self._retries} after: {reply.problem}",
                )
                again = {reply.node_id: payloads[reply.node_id]}
                (reply,) = self._inner.ask(
                    kind, again, round_number=round_number, deadline=deadline
                )
            yield reply


class FaultyChannel:
    """A `Channel` on which a scenario happens to training rounds.

    Args:
        inner: What answers.
        scenario: What happens.
        log: Takes an event for each thing that happens.
        void: How often each round was void before, for lack of sites.
        crashed: Whether the coordinator has crashed already.
    """

    def __init__(
        self,
        inner: Channel,
        scenario: Scenario,
        *,
        log: Log,
        void: Mapping[int, int],
        crashed: Callable[[], bool],
    ) -> None:
        self._inner, self._scenario, self._void = inner, scenario, void
        self._names: dict[int, str] = {}
        self._log, self._crashed = log, crashed

    def node_ids(self) -> list[int]:
        """All nodes."""
        return self._inner.node_ids()

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """As `Channel`. Sites that are away are not asked; those that crash or are late are."""
        if kind not in _IN_A_ROUND:
            for reply in self._inner.ask(
                kind, payloads, round_number=round_number, deadline=deadline
            ):
                if kind == ADMIT and reply.payload is not None:
                    self._names[reply.node_id] = str(reply.payload.record["terms"]["site"])
                yield reply
            return
        scenario = self._scenario_of(round_number)
        there = {
            node: payload
            for node, payload in payloads.items()
            if not scenario.dropped(self._names[node], round_number)
        }
        answers = self._inner.ask(kind, there, round_number=round_number, deadline=deadline)
        if kind == TRAIN:
            yield from self._trained(payloads, there, answers, round_number)
            return
        for node in payloads:
            yield next(answers) if node in there else Reply(node, None, _AWAY)

    def _trained(
        self,
        payloads: Mapping[int, Payload],
        there: Mapping[int, Payload],
        answers: Iterator[Reply],
        round_number: int,
    ) -> Iterator[Reply]:
        replies = self._forged(answers)
        half = len(there) // 2
        slowest, answered = 0.0, 0
        for node in payloads:
            if node not in there:
                yield self._lost(node, round_number, "dropped", _AWAY)
                continue
            reply = next(replies)
            answered += 1
            if answered > half and self._coordinator_crashes(round_number):
                raise CoordinatorCrashed(f"the coordinator crashed in round {round_number}")
            slowest = max(slowest, self._waited(node, round_number))
            yield self._passed(reply, round_number)
        for _ in replies:
            raise RuntimeError("more replies than sites")
        if self._scenario.settings.stragglers is not None:
            self._log("waited", round=round_number, virtual_seconds=round(slowest, 3))

    def _passed(self, reply: Reply, round_number: int) -> Reply:
        name, scenario = self._names[reply.node_id], self._scenario_of(round_number)
        if scenario.crashes(name, round_number):
            reason = "it crashed in the middle of the round"
            return self._lost(reply.node_id, round_number, "crashed", reason)
        seconds = scenario.seconds(name, round_number)
        stragglers = scenario.settings.stragglers
        if stragglers is not None and seconds > stragglers.deadline:
            reason = f"it took {seconds:.0f} s of {stragglers.deadline:g}"
            return self._lost(reply.node_id, round_number, "late", reason)
        attack = scenario.settings.malicious
        if attack is not None and name in scenario.malicious and reply.payload is not None:
            self._log("attacked", round=round_number, site=name, reason=attack.attack)
        return reply

    def _lost(self, node: int, round_number: int, what: str, reason: str) -> Reply:
        self._log(what, round=round_number, site=self._names[node], reason=reason)
        return Reply(node, None, f"{what}: {reason}")

    def _waited(self, node: int, round_number: int) -> float:
        stragglers = self._scenario.settings.stragglers
        limit = stragglers.deadline if stragglers is not None else 0.0
        seconds = self._scenario_of(round_number).seconds(self._names[node], round_number)
        return min(seconds, limit)

    def _scenario_of(self, round_number: int) -> Scenario:
        return self._scenario.again(self._void.get(round_number, 0))

    def _coordinator_crashes(self, round_number: int) -> bool:
        at = self._scenario.settings.coordinator_crash
        return at == round_number and not self._crashed()

    def _forged(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        """Attackers answer last, having seen the honest updates; the order stays."""
        attack = self._scenario.settings.malicious
        if attack is None or not attack.sees_updates:
            yield from replies
            return
        kept = list(replies)
        honest = [
            update
            for reply in kept
            if self._names[reply.node_id] not in self._scenario.malicious
            and (update := _update_of(reply)) is not None
        ]
        for reply in kept:
            name, own = self._names[reply.node_id], _update_of(reply)
            if name not in self._scenario.malicious or own is None or reply.payload is None:
                yield reply
                continue
            forged = forge(attack, own, honest, attackers=len(self._scenario.malicious))
            arrays = {**reply.payload.arrays, "update": forged}
            yield reply._replace(payload=Payload(reply.payload.record, arrays))


def _update_of(reply: Reply) -> Vector | None:
    return None if reply.payload is None else reply.payload.arrays.get("update")


def with_scenario(channel: Channel, scenario: Scenario, run: RunDirectory) -> Channel:
    """The channel, with whatever is to happen on it now, after what the run's log says."""
    if scenario.quiet:
        return channel
    return FaultyChannel(
        channel,
        scenario,
        log=run.event,
        void=Counter(event["round"] for event in run.events() if event["event"] == "void"),
        crashed=lambda: any(e["event"] == "coordinator crashed" for e in run.events()),
    )


def run_until_done(
    channel: Channel, scenario: Scenario, context: Context, run: RunDirectory
) -> None:
    """Run the coordinator; one that the scenario crashes is started again.

    So is one whose round is void because too many sites are away: they come back.

    Raises:
        AggregationAborted: They do not, or nobody is to be away.
    """
    while True:
        try:
            run_study(with_scenario(channel, scenario, run), context)
        except CoordinatorCrashed as crash:
            run.event("coordinator crashed", reason=f"{crash}; it goes on from its checkpoint")
        except AggregationAborted as aborted:
            if scenario.quiet or _void_in_a_row(run) >= _MOST_VOID:
                raise
            missing = len(aborted.missing)
            run.event(
                "void",
                round=aborted.round_number,
                reason=f"{missing} sites did not answer, {aborted.threshold} are needed",
            )
        else:
            return


def _void_in_a_row(run: RunDirectory) -> int:
    """How many rounds were void since one was not."""
    void = 0
    for event in run.events():
        if event["event"] == "round":
            void = 0
        elif event["event"] == "void":
            void += 1
    return void
