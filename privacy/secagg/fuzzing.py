"""Malformed bytes for every reader of the protocol, and what must hold when they come."""

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

import numpy as np

from fedward.core.errors import UpdateRejected
from fedward.privacy.secagg.rounds import make_sessions
from fedward.privacy.secagg.wire import HEADER

_LENGTH: Final = 5
_CHECK_EVERY: Final = 50
_INTERESTING: Final = (0, 1, 0x7F, 0x80, 0xFF)

Receive = Callable[[Any, bytes], object]


@dataclass(frozen=True, slots=True)
class Stage:
    """A reader that waits for a message, and that message as an honest sender writes it."""

    name: str
    subject: object
    receive: Receive
    message: bytes


def stages() -> list[Stage]:
    """Every reader of a site and of the coordinator, each at the moment when it listens."""
    found: list[Stage] = []

    def stage(name: str, subject: object, receive: Receive, message: bytes | memoryview) -> None:
        found.append(Stage(name, copy.deepcopy(subject), receive, bytes(message)))

    coordinator, sites = make_sessions(4, length=_LENGTH, threads=1)
    names = sorted(sites)
    one, site = names[0], sites[names[0]]
    stage("key", coordinator, lambda c, m: c.add_key(one, m), site.key())
    for name in names:
        coordinator.add_key(name, sites[name].key())
    key_list = coordinator.key_list()
    stage("accept", site, lambda s, m: s.accept(m), key_list[one])
    bundles = {name: sites[name].accept(key_list[name]) for name in names}
    stage("shares", coordinator, lambda c, m: c.add_shares(one, m), bundles[one])
    requests = coordinator.shares_request(1)
    stage("shares request", site, lambda s, m: s.shares(m), requests[one])
    for name in names:
        coordinator.add_shares(name, bundles[name])
    requests = coordinator.open_round(1)
    stage("begin", site, lambda s, m: s.begin(m), requests[one])
    for name in names:
        sites[name].begin(requests[name])
    updates = {name: sites[name].mask(np.zeros(_LENGTH, np.uint32)) for name in names[:3]}
    stage("update", coordinator, lambda c, m: c.add_update(one, m), updates[one])
    for name, update in updates.items():
        coordinator.add_update(name, update)
    requests = coordinator.close_updates()
    stage("confirm", site, lambda s, m: s.confirm(m), requests[one])
    replies = {name: sites[name].confirm(requests[name]) for name in names[:3]}
    stage("confirmation", coordinator, lambda c, m: c.add_confirmation(one, m), replies[one])
    for name, reply in replies.items():
        coordinator.add_confirmation(name, reply)
    requests = coordinator.unmask_requests()
    stage("unmask", site, lambda s, m: s.unmask(m), requests[one])
    reply = site.unmask(requests[one])
    stage("unmasking", coordinator, lambda c, m: c.add_unmasking(one, m), reply)
    return found


def fuzz(cases: int, *, rng: random.Random) -> Counter[str]:
    """Feed `cases` malformed messages to the readers in turn.

    A reader must accept a message (some bits are an honest sender's to choose) or raise
    `UpdateRejected`, and a reader that raised must be as it was. Any other exception passes
    through.

    Returns:
        How many were rejected and accepted.

    Raises:
        AssertionError: A rejected message changed its reader, or the honest one does not pass.
    """
    outcome: Counter[str] = Counter()
    waiting = stages()
    other = [stage.message for stage in waiting]
    for stage in waiting:
        subject, before = copy.deepcopy(stage.subject), _state(stage.subject)
        for case in range(-(-cases // len(waiting))):
            message = mutate(stage.message, other, rng)
            if message == stage.message:
                continue
            try:
                stage.receive(subject, message)
            except UpdateRejected:
                outcome["rejected"] += 1
                if case % _CHECK_EVERY == 0 and _state(subject) != before:
                    raise AssertionError(f"a rejected {stage.name} left a trace") from None
            else:
                outcome["accepted"] += 1
                subject = copy.deepcopy(stage.subject)
        if _state(subject) != before:
            raise AssertionError(f"a rejected {stage.name} left a trace")
        stage.receive(subject, stage.message)
    return outcome


def mutate(message: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One malformed message: bits flipped, bytes changed, cut, repeated, inserted or spliced."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of the changes hit the header's end and what follows, where lengths and counts are.
        top = len(data) if rng.random() < 0.5 else min(len(data), HEADER + 12)  # noqa: PLR2004
        at = rng.randrange(top) if top else 0
        match rng.randrange(7):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice(_INTERESTING)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 40)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 5:
                piece = rng.choice(others)
                data[at:] = piece[at:]
            case _:
                data += data[at : at + rng.randrange(1, 100)]
    return bytes(data)


def _state(value: object) -> object:
    """All that an object holds, as something that compares by value."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: _state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_state(item) for item in value]
    if is_dataclass(value):
        return [_state(getattr(value, one.name)) for one in fields(value)]
    if type(value).__name__.endswith("Session"):
        return _state(vars(value))
    return value
