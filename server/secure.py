"""The coordinator's side of secure aggregation, between the round loop and the state machine."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.errors import UpdateRejected
from fedward.core.identity import PublicIdentity
from fedward.privacy.secagg import CoordinatorSession, Terms
from fedward.server.channel import Reply
from fedward.server.execution import Execution
from fedward.server.members import Member
from fedward.strategies.strategy import State, Strategy
from fedward.transport.payload import Payload
from fedward.transport.sums import sharing, sum_codec

Take = Callable[[str, bytes], None]


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
        self._execution = execution
        degree = sharing(sites=len(roster))
        terms = Terms.propose(
            study=study.hash,
            roster=roster,
            length=size + 1,
            min_sites=study.aggregation.min_sites,
            adversary=study.aggregation.adversary,
            threshold=None if degree is None else degree.threshold,
            neighbors=None if degree is None else degree.neighbors,
        )
        if degree is not None:
            execution.run.event("graph", sites=len(roster), **asdict(degree))
        self._terms = terms
        self._session = CoordinatorSession(terms, roster=roster)
        self._codec = sum_codec(study, sites=len(roster), size=size)
        self.cost = Cost(sites=len(roster))
        self._size = size

    def agree(self) -> None:
        """Agree on keys, once a run.

        Raises:
            AggregationAborted: Too few sites answer.
        """
        terms = {"terms": self._terms.to_json()}
        members = {member.site: terms for member in self._execution.members}
        self._ask("train.key", members, "key", self._session.add_key, round_number=0)
        keys = {site: {"keys": data} for site, data in self._session.key_list().items()}
        self._ask("train.share", keys, "shares", self._session.add_shares, round_number=0)

    def round(self, strategy: Strategy, state: State, round_number: int) -> tuple[State, list[str]]:
        """Run one round on sums alone; returns the next state and who is in the sum.

        Raises:
            AggregationAborted: The round is void: nothing was learnt, and its number is used up.
        """
        session = self._session
        started = time.monotonic()
        lacking = session.shares_request(round_number)
        requests = {site: {"request": data} for site, data in lacking.items()}
        self._ask("train.shares", requests, "shares", session.add_shares, round_number=round_number)
        opened = session.open_round(round_number)
        more = {
            "round": round_number,
            "instructions": dict(strategy.instructions(state)),
            "parameters": state.parameters,
        }
        asked = {site: {"secagg": data, **more} for site, data in opened.items()}
        self._ask("train.update", asked, "masked", session.add_update, round_number=round_number)
        begun = time.monotonic()
        confirm = {site: {"request": data} for site, data in session.close_updates().items()}
        self._ask(
            "train.confirm", confirm, "confirmation", session.add_confirmation,
            round_number=round_number,
        )  # fmt: skip
        unmask = {site: {"request": data} for site, data in session.unmask_requests().items()}
        self._ask(
            "train.unmask", unmask, "unmasking", session.add_unmasking, round_number=round_number
        )
        result = session.finish()
        for holder, dealer in result.disputes:
            self._execution.run.event(
                "disputed", round=round_number, site=holder, reason=f"its share of {dealer} differs"
            )
        mean, weight = self._codec.decode(result.total)
        ended = time.monotonic()
        self.cost.seconds += ended - begun
        self.cost.total += ended - started
        self.cost.plain += 4 * self._size * len(result.survivors)
        return strategy.finish(strategy.fold(state, mean, weight)), list(result.survivors)

    def _ask(
        self,
        kind: str,
        requests: Mapping[str, Mapping[str, Any]],
        answer: str,
        take: Take,
        *,
        round_number: int,
    ) -> None:
        payloads = {site: self._payload(parts) for site, parts in requests.items()}
        for member, reply in self._execution.ask_each(kind, payloads, round_number=round_number):
            try:
                data = _read(member, reply, answer)
                if kind == "train.key":
                    self._check_scale(member, reply)
                self.cost.sent[answer] = self.cost.sent.get(answer, 0) + len(data)
                take(member.site, data)
            except UpdateRejected as error:
                self._execution.run.event(
                    "failed", round=round_number, site=member.site, step=kind, reason=error.reason
                )

    def _check_scale(self, member: Member, reply: Reply) -> None:
        said = reply.payload.record.get("granularity") if reply.payload is not None else None
        if said != self._codec.granularity.hex():
            raise UpdateRejected(
                site=member.site,
                reason="it computes another scale of the integers; install the same versions there",
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


def _read(member: Member, reply: Reply, answer: str) -> bytes:
    if reply.payload is None:
        raise UpdateRejected(site=member.site, reason=str(reply.problem))
    array = reply.payload.arrays.get(answer)
    if array is None or array.dtype != np.uint8:
        raise UpdateRejected(site=member.site, reason=f"its {answer} is missing")
    return array.tobytes()
