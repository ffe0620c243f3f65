"""A site's side of secure aggregation, between Flower's messages and the state machine.

A site may be a new process for each message, so the session's keys lie in the state folder, for
the site's eyes only, from admission to the end of the run.
"""

import json
import os
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
from fedward.transport.payload import Payload
from fedward.transport.sums import sum_codec

_COORDINATOR = "coordinator"


def send_key(site: LocalSite, request: Payload) -> Payload:
    """Check the terms of a run against the roster and the policy; answer with a signed key.

    Raises:
        AdmissionRefused, UpdateRejected: The terms are not those of the consortium, or malformed.
    """
    admitted = _admitted(site, request)
    try:
        terms = Terms.from_json(request.record["terms"])
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRejected(site=_COORDINATOR, reason=f"its terms are wrong: {error}") from error
    kept = _load(site, admitted.study)
    if kept is not None and kept.get("terms") == terms.to_json():
        session = _thaw(site, admitted.study, kept)
    else:
        session = _session(site, admitted.study, terms)
        # A new agreement does not reopen rounds that were answered under an older one.
        kept = {"terms": terms.to_json(), "last_round": 0 if kept is None else kept["last_round"]}
    _save(site, admitted.study, session, kept)
    codec = sum_codec(admitted.study, sites=len(terms.sites), size=terms.length - 1)
    reply = _reply(site, key=session.key())
    # The scale of the integers is computed at both ends, and must be the same to the last bit.
    return Payload({**reply.record, "granularity": codec.granularity.hex()}, reply.arrays)


def send_shares(site: LocalSite, request: Payload) -> Payload:
    """Agree on keys with the other sites; answer with shares of this site's secrets for them."""
    admitted, session, kept = _resume(site, request)
    shares = session.accept(_bytes(request, "keys"))
    _save(site, admitted.study, session, kept)
    return _reply(site, shares=shares)


def send_later_shares(site: LocalSite, request: Payload) -> Payload:
    """Shares of later rounds, for a site that was away."""
    _, session, _ = _resume(site, request)
    return _reply(site, shares=session.shares(_bytes(request, "request")))


def confirm(site: LocalSite, request: Payload) -> Payload:
    """Sign who survives a round in which some dropped out."""
    admitted, session, kept = _resume(site, request)
    answer = session.confirm(_bytes(request, "request"))
    _save(site, admitted.study, session, kept)
    return _reply(site, confirmation=answer)


def unmask(site: LocalSite, request: Payload) -> Payload:
    """Give one share of each site, so that the sum can be read and nothing else."""
    admitted, session, kept = _resume(site, request)
    answer = session.unmask(_bytes(request, "request"))
    _save(site, admitted.study, session, kept)
    return _reply(site, unmasking=answer)


class MaskedRound:
    """One round of one site: opened before training, masked after it.

    Raises:
        UpdateRejected: The round is not newer than every round that this site answered.
    """

    def __init__(self, site: LocalSite, request: Payload) -> None:
        self._site = site
        self._admitted, self._session, self._kept = _resume(site, request)
        number = self._session.begin(_bytes(request, "secagg"))
        if number != request.record.get("round"):
            raise UpdateRejected(site=_COORDINATOR, reason="it opens another round than it names")
        if number <= self._kept["last_round"]:
            raise UpdateRejected(
                site=_COORDINATOR, reason=f"round {number} was answered here already"
            )
        self._number = number

    def mask(self, vector: Vector, *, weight: float) -> Payload:
        """The site's vector and its weight, as one masked vector of integers.

        Args:
            vector: The update or, in mode "distributed", the sum of clipped gradients.
            weight: The site's public number of training patients.
        """
        study = self._admitted.study
        codec = sum_codec(study, sites=len(self._kept["terms"]["sites"]), size=vector.size)
        summand = codec.encode(vector, weight=weight, bits=self._bits(study))
        self._kept["last_round"] = self._number
        masked = bytes(self._session.mask(summand))
        _save(self._site, study, self._session, self._kept)
        return Payload(
            {"site": self._site.name, "round": self._number},
            {"masked": np.frombuffer(masked, np.uint8)},
        )

    def _bits(self, study: Study) -> BitStream:
        if self._site.simulated:
            seed = study.study.seed
            return BitStream.simulated(seed, self._site.name, "summand", self._number)
        return BitStream.secure()


def forget(site: LocalSite, study: Study) -> None:
    """Delete the session's keys: the run is over. Its last round stays closed."""
    kept = _load(site, study)
    site.sessions.pop(study.hash, None)
    if kept is not None:
        _write(site, study, {"last_round": kept["last_round"]})


def _admitted(site: LocalSite, request: Payload) -> Admitted:
    admitted = site.admitted(str(request.record.get("hash")))
    if not admitted.study.aggregation.secure:
        raise UpdateRejected(site=_COORDINATOR, reason="the study has [aggregation] secure = false")
    return admitted


def _resume(site: LocalSite, request: Payload) -> tuple[Admitted, SiteSession, dict[str, Any]]:
    admitted = _admitted(site, request)
    kept = _load(site, admitted.study)
    if kept is None or "terms" not in kept:
        raise UpdateRejected(site=_COORDINATOR, reason="no keys were agreed on in this run")
    return admitted, _thaw(site, admitted.study, kept), kept


def _session(site: LocalSite, study: Study, terms: Terms) -> SiteSession:
    roster = site.roster()
    if roster is None:
        raise AdmissionRefused(
            site=site.name,
            policy="[policy] roster",
            reason='secure aggregation needs the consortium\'s roster; add roster = "roster.toml"',
        )
    return SiteSession(
        terms,
        name=site.name,
        identity=site.identity,
        roster=roster,
        study=study.hash,
        min_sites=site.site.policy.min_sites,
    )


def _thaw(site: LocalSite, study: Study, kept: dict[str, Any]) -> SiteSession:
    frozen, session = site.sessions.get(study.hash, ("", None))
    # Another process of this site may have gone on since: what is on disk is the newest.
    if session is None or frozen != kept["session"]:
        session = _session(site, study, Terms.from_json(kept["terms"]))
        session.thaw(kept["session"].encode())
        site.sessions[study.hash] = (kept["session"], session)
    return session


def _load(site: LocalSite, study: Study) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(site.session_file(study).read_bytes())
    except FileNotFoundError:
        return None
    return value


def _save(site: LocalSite, study: Study, session: SiteSession, kept: dict[str, Any]) -> None:
    frozen = session.freeze().decode()
    site.sessions[study.hash] = (frozen, session)
    _write(site, study, {**kept, "session": frozen})


def _write(site: LocalSite, study: Study, value: dict[str, Any]) -> None:
    file, data = site.session_file(study), json.dumps(value)
    if not site.simulated:
        write_atomic(file, data, mode=0o600)
        return
    # A simulated site protects nobody, so it need not outlast a power cut.
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(data, encoding="utf-8")
    temporary.chmod(0o600)
    temporary.replace(file)


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
