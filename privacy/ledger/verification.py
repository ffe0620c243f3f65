"""Is this the ledger that the site wrote, all of it, and does it add up?"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedward.core.errors import LedgerCorrupt
from fedward.core.identity import PublicIdentity
from fedward.privacy.accounting.pricing import GRID, best_epsilon
from fedward.privacy.ledger.records import NO_HASH, Population, Row, check_signature, read_row
from fedward.privacy.ledger.state import State


def replay(rows: Sequence[Row], public: PublicIdentity) -> State:
    """Go through a ledger from its first entry, believing nothing.

    Checks each entry's place, form and signature, that the entries before it permit it, that the
    epsilon it records is the one that its events have, and that no total ever fell.

    Returns:
        The accounts after the last entry.

    Raises:
        LedgerCorrupt: Says which entry, and what is wrong with it.
    """
    if not rows:
        raise LedgerCorrupt("entry 0 is missing: the ledger is empty")
    state, previous = State(), NO_HASH
    totals: dict[tuple[str, float], float] = {}
    for seq, row in enumerate(rows):
        body = read_row(row, seq=seq, previous=previous)
        check_signature(row, public)
        if seq == 0 and body["key"] != public.pem().decode():
            raise LedgerCorrupt("entry 0 names another key than the site's: the ledger is replaced")
        state.apply(body)
        if body["kind"] in ("allot", "close"):
            _check_epsilon(body, state, totals)
        previous = row.hash
    return state


def check_head(rows: Sequence[Row], head: str) -> None:
    """Check that a ledger contains a head that was seen before.

    Raises:
        LedgerCorrupt: It ends before that entry, or has another one in its place.
        ValueError: `head` is not of the form `number:digest`.
    """
    number, separator, digest = head.partition(":")
    if not separator or not number.isdecimal():
        raise ValueError(f"a head looks like 12:9f..., got {head!r}")
    seq = int(number)
    if seq >= len(rows):
        raise LedgerCorrupt(
            f"the ledger ends at entry {len(rows) - 1}, and entry {seq} has been seen before: this "
            "is an older copy, or its end was cut off"
        )
    if rows[seq].hash != digest:
        raise LedgerCorrupt(
            f"entry {seq} is not the one that was seen before: the ledger went on from an older "
            "copy, or was replaced"
        )


def verify_export(value: Mapping[str, Any], *, public: PublicIdentity) -> State:
    """Check what `Ledger.export` gave, away from the site.

    Raises:
        LedgerCorrupt: It is not such a value, or an entry of it is not right.
    """
    try:
        rows = [
            Row(int(entry["seq"]), entry["body"].encode(), bytes.fromhex(entry["signature"]))
            for entry in value["entries"]
        ]
        head = str(value["head"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LedgerCorrupt("this is no exported ledger") from error
    state = replay(rows, public)
    check_head(rows, head)
    return state


def _check_epsilon(
    body: Mapping[str, Any], state: State, totals: dict[tuple[str, float], float]
) -> None:
    """Recompute what an entry records, to the accountant's own precision."""
    delta = body["delta"]
    population: Population = state.studies[body["study"]].population
    populations: tuple[Population, ...] = (
        ("training", "held-out") if population == "all" else (population,)
    )
    spent = {side: best_epsilon(state.spent(side), delta=delta) for side in populations}
    recorded = {"spent": body.get("spent", body["epsilon"])}
    expected = {"spent": max(spent.values())}
    if body["kind"] == "allot":
        recorded["epsilon"] = body["epsilon"]
        expected["epsilon"] = max(
            best_epsilon(state.committed(side), delta=delta) for side in populations
        )
        if not body["epsilon"] <= body["max_epsilon"]:
            raise LedgerCorrupt(f"entry {body['seq']} allots more than its limit")
    for name, value in expected.items():
        if not _close(recorded[name], value):
            raise LedgerCorrupt(
                f"entry {body['seq']} records epsilon {recorded[name]}, but its events and those "
                f"before it have {value:.4f}"
            )
    for side, value in spent.items():
        if value < totals.get((side, delta), 0.0) - GRID:
            raise LedgerCorrupt(f"entry {body['seq']}: the total of the {side} patients fell")
        totals[side, delta] = value


def _close(recorded: float | None, expected: float) -> bool:
    if recorded is None:
        return expected == float("inf")
    return abs(recorded - expected) <= GRID * max(1.0, expected)
