"""The coordinator's side of secure aggregation, between the round loop and the state machine."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.errors import AggregationAborted, UpdateRejected
from fedward.core.identity import PublicIdentity
from fedward.privacy.secagg import CoordinatorSession, RoundSum, Terms, audit
from fedward.server.channel import Reply
from fedward.server.execution import Execution
from fedward.server.groups import Groups
from fedward.server.members import Member
from fedward.strategies.strategy import State, Strategy, Vector
from fedward.tasks.reference import size as cells
from fedward.transport.monitor import monitor_codec, monitor_layout, monitor_round
from fedward.transport.payload import Payload
from fedward.transport.sums import SumCodec, sharing, sum_codec

Take = Callable[[str, bytes], None]

_FLOAT32 = 1e-6  # what clipping in float32 may be off by, of the clip norm


@dataclass(slots=True)
class Cost:
    """What secure aggregation took, seen from the coordinator.

    Attributes:
        sites: Number of sites.
        seconds: Waiting for confirmations and shares and taking off masks, over all rounds.
        total: Seconds of all rounds, training included.
        sent: Bytes that all sites sent, by kind of message.
        plain: Bytes that the same updates would have had as float32.
    """

    sites: int
    seconds: float = 0.0
    total: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    plain: int = 0

    def to_json(self) -> dict[str, Any]:
        """Per site, as it is shown at the end of a run."""
        return {
            "seconds": round(self.seconds, 3),
            "share_of_rounds": round(self.seconds / self.total, 4) if self.total else 0.0,
            "bytes_per_site": sum(self.sent.values()) // self.sites,
            "bytes_per_site_plain": self.plain // self.sites,
            "bytes_by_message": dict(self.sent),
        }


class SecureRounds:
    """Secure aggregation in one execution: one key agreement, then round after round.

    Args:
        execution: The study under way.
        roster: Every site's pinned identity.
        size: Number of parameters.
    """

    def __init__(
        self, execution: Execution, *, roster: Mapping[str, PublicIdentity], size: int
    ) -> None:
        study = execution.study
        self._execution, self._roster = execution, dict(roster)
        self._codec = sum_codec(study, sites=len(roster), size=size)
        self.cost = Cost(sites=len(roster))
        self.agreed = False
        self._size = size
        degree = sharing(sites=len(roster))
        if degree is not None:
            execution.run.event("graph", sites=len(roster), **asdict(degree))
        self._terms, self._session = self._propose(tuple(sorted(roster)), length=size + 1)

    def agree(self) -> None:
        """Agree on keys, once a run.

        Raises:
            AggregationAborted: Too few sites answer.
        """
        self.agreed = True
        members = tuple(member.site for member in self._execution.members)
        self._agree(self._everybody(0), dict.fromkeys(members, self._terms), more={})

    def round(self, strategy: Strategy, state: State, round_number: int) -> tuple[State, list[str]]:
        """Run one round on sums alone; returns the next state and who is in the sum.

        Raises:
            AggregationAborted: The round is void: nothing was learnt, and its number is used up.
        """
        started = time.monotonic()
        if round_number in self._execution.study.aggregation.audit_rounds:
            sums = self._audited(strategy, state, round_number)
        else:
            groups = self._everybody(round_number)
            sums = self._sums(groups, strategy, state, round_number, more={})
        # Sums of groups add up to the sum of them all.
        total = sums[0].total
        for result in sums[1:]:
            total += result.total
        mean, weight = self._codec.decode(total)
        self.cost.total += time.monotonic() - started
        state = strategy.finish(strategy.fold(state, mean, weight))
        return state, sorted(name for result in sums for name in result.survivors)

    def histograms(self, parameters: Vector) -> tuple[Vector, int]:
        """The sum of all sites' histograms for drift, and how many sites are in it.

        It has other numbers than an update, so keys are agreed on for it.

        Args:
            parameters: The model whose predictions are counted.

        Raises:
            AggregationAborted: Too few sites answer.
        """
        study = self._execution.study
        codec, number = monitor_codec(study, sites=len(self._roster)), monitor_round(study)
        names = tuple(sorted(self._roster))
        terms, session = self._propose(names, ahead=1, length=cells(monitor_layout(study)) + 1)
        log = self._execution.run.event
        groups = Groups({names: session}, round_number=number, first=1, log=log)
        members = (m.site for m in self._execution.members if m.site in self._roster)
        more = {"audit": number}
        self._agree(
            groups, dict.fromkeys(members, terms), more=more, round_number=number, codec=codec
        )
        asked = {"round": number, "parameters": parameters}
        (result,) = self._exchange(groups, "train.monitor", asked, round_number=number, more=more)
        counts, weight = codec.decode(result.total)
        return counts, round(weight)

    def _audited(self, strategy: Strategy, state: State, round_number: int) -> list[RoundSum]:
        """The sums of random groups that honest sites can have sent."""
        aggregation = self._execution.study.aggregation
        members = [m.site for m in self._execution.members if m.site in self._roster]
        if len(members) < 2 * aggregation.min_sites:
            raise AggregationAborted(
                round_number=round_number,
                missing=sorted(set(self._roster).difference(members)),
                threshold=2 * aggregation.min_sites,
                reason="an audit needs two groups",
            )
        begun = time.monotonic()
        drawn = audit.groups(members, min_sites=aggregation.min_sites)
        length = self._size + 1
        proposed = {names: self._propose(names, ahead=1, length=length) for names in drawn}
        groups = Groups(
            {names: session for names, (_, session) in proposed.items()},
            round_number=round_number,
            first=1,
            log=self._execution.run.event,
        )
        more = {"audit": round_number}
        terms = {name: terms for names, (terms, _) in proposed.items() for name in names}
        self._agree(groups, terms, more=more, round_number=round_number)
        self.cost.seconds += time.monotonic() - begun
        sums = self._sums(groups, strategy, state, round_number, more=more)
        honest = [result for result in sums if not self._is_suspect(result, round_number)]
        if not honest:
            raise AggregationAborted(
                round_number=round_number,
                missing=[],
                threshold=aggregation.min_sites,
                reason="every group of the audit is suspected",
            )
        return honest

    def _is_suspect(self, result: RoundSum, round_number: int) -> bool:
        """Whether somebody in a group did not clip; it is said in the log."""
        reason = self._excess(result)
        if reason:
            self._execution.run.event(
                "suspect", round=round_number, site=", ".join(result.survivors), reason=reason
            )
        return bool(reason)

    def _excess(self, result: RoundSum) -> str:
        """What of a group's sum no honest sites can have sent; empty if they can.

        A weight is a share of `max_weight`, so that a sum of weighted updates is at most as long
        as the sum of the shares times `clip_norm`; rounding adds a granule a site to each.
        """
        bounds, count = self._execution.study.aggregation, len(result.survivors)
        granule, clip_norm = self._codec.granularity, bounds.clip_norm or 0.0
        try:
            mean, weight = self._codec.decode(result.total)
        except ValueError:
            return "its weights are not positive"
        share = weight / bounds.max_weight
        if share > count * (1 + granule):
            return f"its weights are more than {count} times max_weight = {bounds.max_weight}"
        long = audit.suspects(
            {result.survivors: mean.astype(np.float64) * share},
            clip_norm=(share / count + granule) * clip_norm * (1 + _FLOAT32),
            granularity=granule * bounds.max_update,
        )
        return (
            f"the mean of its updates is {np.linalg.norm(mean):.3g} long and clip_norm is "
            f"{clip_norm:g}: at least one of them was not clipped"
            if long
            else ""
        )

    def _propose(
        self, names: tuple[str, ...], *, length: int, ahead: int = 4
    ) -> tuple[Terms, CoordinatorSession]:
        study = self._execution.study
        roster = {name: self._roster[name] for name in names}
        degree = sharing(sites=len(roster))
        terms = Terms.propose(
            study=study.hash,
            roster=roster,
            length=length,
            min_sites=study.aggregation.min_sites,
            adversary=study.aggregation.adversary,
            threshold=None if degree is None else degree.threshold,
            neighbors=None if degree is None else degree.neighbors,
        )
        return terms, CoordinatorSession(terms, roster=roster, ahead=ahead)

    def _everybody(self, round_number: int) -> Groups:
        return Groups(
            {self._terms.names: self._session},
            round_number=round_number,
            first=round_number,
            log=self._execution.run.event,
        )

    def _agree(
        self,
        groups: Groups,
        terms: Mapping[str, Terms],
        *,
        more: Mapping[str, Any],
        round_number: int = 0,
        codec: SumCodec | None = None,
    ) -> None:
        ask = partial(self._ask, more=more, round_number=round_number)
        proposals = {site: {"terms": part.to_json()} for site, part in terms.items()}
        ask("train.key", proposals, "key", lambda s, data: groups.of(s).add_key(s, data),
            codec=codec or self._codec)  # fmt: skip
        keys = groups.requests(lambda session: session.key_list())
        ask("train.share", _named("keys", keys), "shares",
            lambda s, data: groups.of(s).add_shares(s, data))  # fmt: skip

    def _sums(
        self,
        groups: Groups,
        strategy: Strategy,
        state: State,
        round_number: int,
        *,
        more: Mapping[str, Any],
    ) -> list[RoundSum]:
        """One round in each group: the sums of those that are not void."""
        training = {
            "round": round_number,
            "instructions": dict(strategy.instructions(state)),
            "parameters": state.parameters,
        }
        sums = self._exchange(
            groups, "train.update", training, round_number=round_number, more=more
        )
        self.cost.plain += 4 * self._size * sum(len(result.survivors) for result in sums)
        return sums

    def _exchange(
        self,
        groups: Groups,
        kind: str,
        asked: Mapping[str, Any],
        *,
        round_number: int,
        more: Mapping[str, Any],
    ) -> list[RoundSum]:
        """Ask the sites of each group for what is summed; the sums of those that are not void."""
        ask, number = partial(self._ask, more=more, round_number=round_number), groups.number
        lacking = groups.requests(lambda session: session.shares_request(number))
        ask("train.shares", _named("request", lacking), "shares",
            lambda s, data: groups.of(s).add_shares(s, data))  # fmt: skip
        opened = groups.requests(lambda session: session.open_round(number))
        each = {site: {"secagg": data, **asked} for site, data in opened.items()}
        ask(kind, each, "masked", lambda s, data: groups.of(s).add_update(s, data))
        begun = time.monotonic()
        confirm = groups.requests(lambda session: session.close_updates())
        ask("train.confirm", _named("request", confirm), "confirmation",
            lambda s, data: groups.of(s).add_confirmation(s, data))  # fmt: skip
        unmask = groups.requests(lambda session: session.unmask_requests())
        ask("train.unmask", _named("request", unmask), "unmasking",
            lambda s, data: groups.of(s).add_unmasking(s, data))  # fmt: skip
        sums = list(groups.each(lambda session: session.finish()).values())
        for holder, dealer in (pair for result in sums for pair in result.disputes):
            self._execution.run.event(
                "disputed", round=round_number, site=holder, reason=f"its share of {dealer} differs"
            )
        self.cost.seconds += time.monotonic() - begun
        return sums

    def _ask(
        self,
        kind: str,
        requests: Mapping[str, Mapping[str, Any]],
        answer: str,
        take: Take,
        *,
        more: Mapping[str, Any],
        round_number: int,
        codec: SumCodec | None = None,
    ) -> None:
        payloads = {site: self._payload({**parts, **more}) for site, parts in requests.items()}
        for member, reply in self._execution.ask_each(kind, payloads, round_number=round_number):
            try:
                data = _read(member, reply, answer)
                if codec is not None:
                    _check_scale(member, reply, codec)
                self.cost.sent[answer] = self.cost.sent.get(answer, 0) + len(data)
                take(member.site, data)
            except UpdateRejected as error:
                self._execution.run.event(
                    "failed", round=round_number, site=member.site, step=kind, reason=error.reason
                )

    def _payload(self, parts: Mapping[str, Any]) -> Payload:
        record: dict[str, Any] = {"hash": self._execution.study.hash}
        arrays: dict[str, NDArray[Any]] = {}
        for name, part in parts.items():
            if isinstance(part, bytes):
                arrays[name] = np.frombuffer(part, np.uint8)
            elif isinstance(part, np.ndarray):
                arrays[name] = part
            else:
                record[name] = part
        return Payload(record, arrays)


def _check_scale(member: Member, reply: Reply, codec: SumCodec) -> None:
    said = reply.payload.record.get("granularity") if reply.payload is not None else None
    if said != codec.granularity.hex():
        raise UpdateRejected(
            site=member.site,
            reason="it computes another scale of the integers; install the same versions there",
        )


def _named(name: str, requests: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    return {site: {name: data} for site, data in requests.items()}


def _read(member: Member, reply: Reply, answer: str) -> bytes:
    if reply.payload is None:
        raise UpdateRejected(site=member.site, reason=str(reply.problem))
    array = reply.payload.arrays.get(answer)
    if array is None or array.dtype != np.uint8:
        raise UpdateRejected(site=member.site, reason=f"its {answer} is missing")
    return array.tobytes()
