"""A site's side of secure aggregation, between Flower's messages and the state machine.

A site may be a new process for each message, so the session's keys lie in the state folder, for
the site's eyes only, from admission to the end of the run.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.client.local_site import Admitted, LocalSite
from fedward.core.errors import AdmissionRefused, UpdateRejected
from fedward.core.files import write_atomic
from fedward.core.study import Study
from fedward.privacy.mechanisms.stream import BitStream
from fedward.privacy.secagg import SiteSession, Terms
from fedward.strategies.strategy import Vector
from fedward.transport.monitor import monitor_codec, monitor_round
from fedward.transport.payload import Payload
from fedward.transport.sums import SumCodec, sum_codec

_COORDINATOR = "coordinator"
_ANSWERED = "round {} was answered here already"


@dataclass(slots=True)
class _Agreed:
    """An agreement on keys: that of the run or, beside it, that of the newest audit round.

    Attributes:
        kept: What the site keeps of all its agreements in this study.
        terms: Of this one.
        audit: The one round that it is for, an audit or that of the histograms; None for that of
            the run.
    """

    site: LocalSite
    admitted: Admitted
    kept: dict[str, Any]
    terms: Terms
    audit: int | None
    session: SiteSession

    def save(self) -> None:
        """Keep the session before an answer leaves."""
        study, frozen = self.admitted.study, self.session.freeze().decode()
        self.site.sessions[_name(study, self.audit)] = (frozen, self.session)
        mine = {"terms": self.terms.to_json(), "session": frozen}
        part = mine if self.audit is None else {"audit": {"round": self.audit, **mine}}
        self.kept = {**self.kept, **part}
        _write(self.site, study, self.kept)

    def codec(self) -> SumCodec:
        """The codec of the whole consortium: sums of groups add up to its sum."""
        study, sites = self.admitted.study, len(self.kept["terms"]["sites"])
        if self.audit == monitor_round(study):
            return monitor_codec(study, sites=sites)
        return sum_codec(study, sites=sites, size=self.terms.length - 1)


def send_key(site: LocalSite, request: Payload) -> Payload:
    """Check the terms of a run against the roster and the policy; answer with a signed key.

    Or those of an audit round's group, against the study as well: there is one group a round.

    Raises:
        AdmissionRefused, UpdateRejected: The terms are not those of the consortium, or malformed.
    """
    admitted = _admitted(site, request)
    study = admitted.study
    try:
        terms = Terms.from_json(request.record["terms"])
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRejected(site=_COORDINATOR, reason=f"its terms are wrong: {error}") from error
    audit, kept = request.record.get("audit"), _load(site, study)
    if audit is not None:
        _check_audit(study, audit, kept, terms)
    before = kept if audit is None or kept is None else kept.get("audit")
    known = before is not None and before.get("round") == audit
    if before is not None and known and before.get("terms") == terms.to_json():
        session = _thaw(site, study, before, audit)
    else:
        session = _session(site, study, terms, part=_is_group(study, audit))
    # A new agreement does not reopen rounds that were answered under an older one.
    agreed = _Agreed(site, admitted, kept or {"last_round": 0}, terms, audit, session)
    agreed.save()
    codec = agreed.codec()
    reply = _reply(site, key=session.key())
    # The scale of the integers is computed at both ends, and must be the same to the last bit.
    return Payload({**reply.record, "granularity": codec.granularity.hex()}, reply.arrays)


def _check_audit(study: Study, number: Any, kept: dict[str, Any] | None, terms: Terms) -> None:
    """Whether a group may be audited in a round: the study says when, and a site is in one group.

    A second group in the same round, or the round's update in another sum as well, would show a
    difference of sums.
    """
    if type(number) is not int or number not in _apart(study):
        raise UpdateRejected(
            site=_COORDINATOR, reason=f"[aggregation] audit_rounds has no round {number}"
        )
    if kept is None or "terms" not in kept:
        raise UpdateRejected(site=_COORDINATOR, reason="no keys were agreed on in this run")
    if number <= kept["last_round"]:
        raise UpdateRejected(site=_COORDINATOR, reason=_ANSWERED.format(number))
    before = kept.get("audit", {"round": 0})
    if number < before["round"] or (
        number == before["round"] and before["terms"] != terms.to_json()
    ):
        raise UpdateRejected(
            site=_COORDINATOR,
            reason=f"a group was agreed on for audit round {before['round']}; there is one a round",
        )


def send_shares(site: LocalSite, request: Payload) -> Payload:
    """Agree on keys with the other sites; answer with shares of this site's secrets for them."""
    agreed = _resume(site, request)
    shares = agreed.session.accept(_bytes(request, "keys"))
    agreed.save()
    return _reply(site, shares=shares)


def send_later_shares(site: LocalSite, request: Payload) -> Payload:
    """Shares of later rounds, for a site that was away."""
    return _reply(site, shares=_resume(site, request).session.shares(_bytes(request, "request")))


def confirm(site: LocalSite, request: Payload) -> Payload:
    """Sign who survives a round in which some dropped out."""
    agreed = _resume(site, request)
    answer = agreed.session.confirm(_bytes(request, "request"))
    agreed.save()
    return _reply(site, confirmation=answer)


def unmask(site: LocalSite, request: Payload) -> Payload:
    """Give one share of each site, so that the sum can be read and nothing else."""
    agreed = _resume(site, request)
    answer = agreed.session.unmask(_bytes(request, "request"))
    agreed.save()
    return _reply(site, unmasking=answer)


class MaskedRound:
    """One round of one site: opened before training, masked after it.

    Raises:
        UpdateRejected: The round is not newer than every round that this site answered.
    """

    def __init__(self, site: LocalSite, request: Payload) -> None:
        self._site, self._agreed = site, _resume(site, request)
        number, audit = request.record.get("round"), self._agreed.audit
        audited = number in _apart(self._agreed.admitted.study)
        if audited != (audit is not None):
            raise UpdateRejected(
                site=_COORDINATOR, reason="an audit round is asked of groups, any other of all"
            )
        opened = self._agreed.session.begin(_bytes(request, "secagg"))
        # A group's agreement is for one round, which is its first.
        if opened != (number if audit is None else 1) or number != (audit or number):
            raise UpdateRejected(site=_COORDINATOR, reason="it opens another round than it names")
        if not isinstance(number, int) or number <= self._agreed.kept["last_round"]:
            raise UpdateRejected(site=_COORDINATOR, reason=_ANSWERED.format(number))
        self._number = number

    def mask(self, vector: Vector, *, weight: float) -> Payload:
        """The site's vector and its weight, as one masked vector of integers.

        Args:
            vector: The update or, in mode "distributed", the sum of clipped gradients; or
                histograms.
            weight: The site's public number of training patients.
        """
        agreed = self._agreed
        if vector.size + 1 != agreed.terms.length:
            raise UpdateRejected(
                site=_COORDINATOR,
                reason=f"its terms are for {agreed.terms.length} numbers, not {vector.size + 1}",
            )
        codec, bits = agreed.codec(), self._bits(agreed.admitted.study)
        summand = codec.encode(vector, weight=weight, bits=bits)
        agreed.kept["last_round"] = self._number
        masked = bytes(agreed.session.mask(summand))
        agreed.save()
        return Payload(
            {"site": self._site.name, "round": self._number},
            {"masked": np.frombuffer(masked, np.uint8)},
        )

    def _bits(self, study: Study) -> BitStream:
        if self._site.simulated:
            seed = study.study.seed
            return BitStream.simulated(seed, self._site.name, "summand", self._number)
        return BitStream.secure()


def _apart(study: Study) -> set[int]:
    """Rounds with an agreement of their own: audits, and the release of histograms."""
    monitor = set() if study.monitor is None else {monitor_round(study)}
    return monitor.union(study.aggregation.audit_rounds)


def _is_group(study: Study, audit: int | None) -> bool:
    """Whether a round is asked of groups; histograms are of the whole roster."""
    return audit in study.aggregation.audit_rounds


def forget(site: LocalSite, study: Study) -> None:
    """Delete the sessions' keys: the run is over. Its last round stays closed."""
    kept = _load(site, study)
    for name in [name for name in site.sessions if name.startswith(study.hash)]:
        del site.sessions[name]
    if kept is not None:
        last = max(kept["last_round"], kept.get("audit", {"round": 0})["round"])
        _write(site, study, {"last_round": last})


def _admitted(site: LocalSite, request: Payload) -> Admitted:
    admitted = site.admitted(str(request.record.get("hash")))
    if not admitted.study.aggregation.secure:
        raise UpdateRejected(site=_COORDINATOR, reason="the study has [aggregation] secure = false")
    return admitted


def _resume(site: LocalSite, request: Payload) -> _Agreed:
    admitted = _admitted(site, request)
    audit, kept = request.record.get("audit"), _load(site, admitted.study)
    part = kept if audit is None or kept is None else kept.get("audit")
    if kept is None or part is None or "terms" not in part:
        raise UpdateRejected(site=_COORDINATOR, reason="no keys were agreed on in this run")
    if audit is not None and part["round"] != audit:
        raise UpdateRejected(
            site=_COORDINATOR, reason=f"no keys were agreed on for audit round {audit}"
        )
    session = _thaw(site, admitted.study, part, audit)
    return _Agreed(site, admitted, kept, Terms.from_json(part["terms"]), audit, session)


def _session(site: LocalSite, study: Study, terms: Terms, *, part: bool) -> SiteSession:
    """A new session; the terms of a group name `part` of the roster, all others all of it."""
    roster = site.roster()
    if roster is None:
        raise AdmissionRefused(
            site=site.name,
            policy="[policy] roster",
            reason='secure aggregation needs the consortium\'s roster; add roster = "roster.toml"',
        )
    agreed = study.aggregation
    if terms.adversary != agreed.adversary or terms.min_sites < agreed.min_sites:
        raise AdmissionRefused(
            site=site.name,
            policy=f'[aggregation] adversary = "{agreed.adversary}" and min_sites = '
            f"{agreed.min_sites} of the study",
            reason=f'the terms withstand "{terms.adversary}" in sums of {terms.min_sites}',
        )
    if part:
        roster = {name: key for name, key in roster.items() if name in terms.sites}
    return SiteSession(
        terms,
        name=site.name,
        identity=site.identity,
        roster=roster,
        study=study.hash,
        min_sites=site.site.policy.min_sites,
    )


def _name(study: Study, audit: int | None) -> str:
    return study.hash if audit is None else f"{study.hash} audit"


def _thaw(site: LocalSite, study: Study, kept: dict[str, Any], audit: int | None) -> SiteSession:
    frozen, session = site.sessions.get(_name(study, audit), ("", None))
    # Another process of this site may have gone on since: what is on disk is the newest.
    if session is None or frozen != kept["session"]:
        terms = Terms.from_json(kept["terms"])
        session = _session(site, study, terms, part=_is_group(study, audit))
        session.thaw(kept["session"].encode())
        site.sessions[_name(study, audit)] = (kept["session"], session)
    return session


def _load(site: LocalSite, study: Study) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(site.session_file(study).read_bytes())
    except FileNotFoundError:
        return None
    return value


def _write(site: LocalSite, study: Study, value: dict[str, Any]) -> None:
    file, data = site.session_file(study), json.dumps(value)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A simulated site protects nobody, so it need not outlast a power cut.
    write_atomic(file, data, mode=0o600, durable=not site.simulated)


def _bytes(request: Payload, name: str) -> bytes:
    array = request.arrays.get(name)
    if array is None or array.dtype != np.uint8:
        raise UpdateRejected(site=_COORDINATOR, reason=f"its {name} is missing")
    return array.tobytes()


def _reply(site: LocalSite, **parts: bytes) -> Payload:
    arrays: dict[str, NDArray[Any]] = {
        name: np.frombuffer(data, np.uint8) for name, data in parts.items()
    }
    return Payload({"site": site.name}, arrays)
