"""Admission from the coordinator's side: who takes part, under which name and key."""

import re
from dataclasses import dataclass

from fedward.core.canonical import canonical_json
from fedward.core.errors import AggregationAborted, FedwardError, UpdateRejected
from fedward.core.identity import PublicIdentity
from fedward.core.run import RunDirectory
from fedward.core.study import Study
from fedward.server.channel import Channel
from fedward.transport.payload import Payload

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class Member:
    """A site that admitted the study.

    Attributes:
        node_id: Flower's number for the site's process.
        site: The site's name.
        weight: Aggregation weight: the site's public number of training patients; None under
            secure aggregation, where it travels inside the masked sum.
        simulated: Whether the site draws from a seed, so that nothing of it is private.
        ledger_head: Where its ledger stood; None where none is kept.
    """

    node_id: int
    site: str
    weight: float | None
    simulated: bool
    ledger_head: str | None


def admit(
    channel: Channel, study: Study, run: RunDirectory, *, deadline: float
) -> tuple[Member, ...]:
    """Ask every connected node to admit the study; members come back sorted by site.

    Raises:
        AggregationAborted: Fewer than the study's `min_sites` admitted it.
    """
    request = Payload({"study": study.agreed(), "hash": study.hash})
    nodes = channel.node_ids()
    members: dict[str, Member] = {}
    refused: list[str] = []
    first = ""
    replies = channel.ask(
        "query.admit", dict.fromkeys(nodes, request), round_number=0, deadline=deadline
    )
    for reply in replies:
        try:
            if reply.payload is None:
                raise UpdateRejected(site=f"node {reply.node_id}", reason=str(reply.problem))
            member = _read_admission(reply.node_id, reply.payload, study)
            if member.site in members:
                raise UpdateRejected(site=member.site, reason="two nodes claim this name")
        except FedwardError as error:
            refused.append(str(reply.node_id))
            reason = error.reason if isinstance(error, UpdateRejected) else str(error)
            run.event("refused", node=str(reply.node_id), reason=reason)
            first = first or reason
            continue
        members[member.site] = member
        run.event(
            "admitted",
            site=member.site,
            weight=member.weight,
            simulated=member.simulated,
            # Kept, so that a ledger that is older one day shows: `fedward ledger verify --head`.
            ledger_head=member.ledger_head,
        )
    if len(members) < study.aggregation.min_sites:
        raise AggregationAborted(
            round_number=0,
            missing=[f"node {node}" for node in refused],
            threshold=study.aggregation.min_sites,
            reason=first,
        )
    return tuple(members[name] for name in sorted(members))


def _read_admission(node_id: int, payload: Payload, study: Study) -> Member:
    terms, record = payload.record.get("terms"), payload.record
    if not isinstance(terms, dict):
        raise UpdateRejected(site=f"node {node_id}", reason="its admission has no terms")
    try:
        site = str(terms["site"])
        key = PublicIdentity.from_pem(str(terms["key"]).encode())
        key.verify(bytes.fromhex(record["signature"]), canonical_json(terms))
        weight = None if study.aggregation.secure else float(terms["weight"])
    except (KeyError, ValueError, TypeError) as error:
        raise UpdateRejected(
            site=f"node {node_id}", reason=f"its admission is malformed: {error!r}"
        ) from error
    if not _NAME.fullmatch(site) or not (weight is None or 0 < weight < float("inf")):
        raise UpdateRejected(site=f"node {node_id}", reason="its name or weight is not allowed")
    if terms.get("hash") != study.hash:
        raise UpdateRejected(site=site, reason="it admitted another study")
    # The key has done its work, and thousands of members need not hold one.
    return Member(node_id, site, weight, bool(terms.get("simulated")), terms.get("ledger_head"))
