"""A ledger as people and other programs look at it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fedward.core.identity import PublicIdentity
from fedward.privacy.accounting import event_from_json
from fedward.privacy.accounting.events import Leaves, leaves
from fedward.privacy.accounting.pricing import best_epsilon
from fedward.privacy.ledger.records import Entry, Population, Row
from fedward.privacy.ledger.state import State, borne


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of the picture of a budget over time: the total just after a reservation."""

    time: datetime
    study: str
    round_number: int
    epsilon: float


def entries(rows: Sequence[Row], state: State) -> tuple[Entry, ...]:
    """The entries with their states, oldest first; `state` is that after the last row."""
    bodies = [json.loads(row.body) for row in rows]
    open_allotments = {
        seq for study in state.studies.values() if study.open for seq in study.allotments
    }
    return tuple(
        _entry(body, row, state, open_allotments) for body, row in zip(bodies, rows, strict=True)
    )


def history(
    shown: Sequence[Entry], *, delta: float, population: Population, points: int
) -> tuple[Point, ...]:
    """The joint total over time, at no more than about `points` of the reservations."""
    kept = [
        entry
        for entry in shown
        if entry.kind == "reserve" and entry.population in (population, "all")
    ]
    stride = max(1, -(-len(kept) // max(1, points)))
    total: Leaves = Counter()
    found: list[Point] = []
    for number, entry in enumerate(kept, start=1):
        total.update(borne(leaves(entry.event), entry.unit or "patient"))
        if number % stride == 0 or number == len(kept):
            found.append(
                Point(
                    time=entry.time,
                    study=entry.study,
                    round_number=entry.round_number or 0,
                    epsilon=best_epsilon(total, delta=delta),
                )
            )
    return tuple(found)


def export(rows: Sequence[Row], state: State, public: PublicIdentity) -> dict[str, Any]:
    """Everything, as a JSON value that `verify_export` checks."""
    return {
        "site": state.genesis["site"],
        "simulated": state.genesis["simulated"],
        "key": public.pem().decode(),
        "head": f"{rows[-1].seq}:{rows[-1].hash}",
        "entries": [
            {"seq": row.seq, "body": row.body.decode(), "signature": row.signature.hex()}
            for row in rows
        ],
    }


def _entry(body: dict[str, Any], row: Row, state: State, open_allotments: set[int]) -> Entry:
    kind, seq = body["kind"], row.seq
    settled = state.reservations.get(body.get("reservation", seq))
    study = body.get("study", settled.study if settled else "")
    account = state.studies.get(study)
    standing = ""
    if kind == "allot":
        standing = "open" if seq in open_allotments else "closed"
    elif kind == "reserve" and settled is not None:
        standing = "settled" if settled.update_digest else "reserved"
    return Entry(
        seq=seq,
        kind=kind,
        time=datetime.fromisoformat(body["time"]),
        hash=row.hash,
        study=study,
        round_number=body.get("round", settled.round_number if settled else None),
        population=account.population if account else None,
        unit=account.unit if account else None,
        event=event_from_json(body["event"]) if "event" in body else None,
        state=standing,
        epsilon=body.get("epsilon"),
        delta=body.get("delta"),
        max_epsilon=body.get("max_epsilon"),
        update_digest=body.get("update_digest", settled.update_digest if settled else ""),
    )
