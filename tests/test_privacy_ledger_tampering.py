from __future__ import annotations

import copy
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.core.canonical import canonical_json
from fedward.core.errors import LedgerCorrupt
from fedward.core.identity import Identity
from fedward.privacy.accounting import dp_sgd_event
from fedward.privacy.ledger import Ledger, verify_export
from fedward.privacy.ledger.records import Row, sign_row, write_body

DELTA = 1e-5
DIGEST = "ab" * 32
ENTRIES = 9


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity.generate_site()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, identity: Identity) -> Path:
    path = tmp_path_factory.mktemp("site") / "ledger.sqlite"
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        for study in ("heart", "lungs"):
            event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=20)
            ledger.allot(study=study, event=event, max_epsilon=8.0, delta=DELTA, unit="patient")
            part = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=10)
            reservation = ledger.reserve(study=study, round_number=1, event=part)
            ledger.settle(reservation, update_digest=DIGEST)
            ledger.close(study, delta=DELTA)
        assert len(ledger.entries()) == ENTRIES
    return path


@pytest.fixture
def path(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "ledger.sqlite"))


def edit(path: Path, *statements: tuple[Any, ...]) -> None:
    """What somebody with the file and an SQLite shell can do."""
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER entries_never_change")
    connection.execute("DROP TRIGGER entries_never_go")
    for statement, *arguments in statements:
        connection.execute(statement, arguments)
    connection.commit()
    connection.close()


def verify(path: Path, identity: Identity, *, against_head: str | None = None) -> None:
    with Ledger.read(path, public=identity.public) as ledger:
        ledger.verify(against_head=against_head)


def rows_of(path: Path) -> list[Row]:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT * FROM entries ORDER BY seq").fetchall()
    connection.close()
    return [Row(*row) for row in found]


def head_of(path: Path, identity: Identity) -> str:
    with Ledger.read(path, public=identity.public) as ledger:
        return ledger.head


def test_an_untouched_ledger_verifies(path: Path, identity: Identity) -> None:
    verify(path, identity, against_head=head_of(path, identity))


@pytest.mark.parametrize("statement", ["UPDATE entries SET body = x'00'", "DELETE FROM entries"])
def test_the_file_refuses_slips(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)

    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)

    connection.close()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_in_any_entry_is_reported_with_its_place(
    data: st.DataObject, written: Path, identity: Identity, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path(shutil.copy(written, tmp_path_factory.getbasetemp() / "flipped.sqlite"))
    seq = data.draw(st.integers(0, ENTRIES - 1))
    column = data.draw(st.sampled_from(["body", "signature"]))
    original = getattr(rows_of(path)[seq], column)
    place, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[place] ^= 1 << bit
    edit(path, (f"UPDATE entries SET {column} = ? WHERE seq = ?", bytes(changed), seq))

    with pytest.raises(LedgerCorrupt) as found:
        verify(path, identity)

    # The chain breaks at the entry, or its neighbour does not follow.
    assert any(f"entry {number}" in str(found.value) for number in (seq, seq + 1))


@pytest.mark.parametrize("seq", range(ENTRIES - 1))
def test_a_deleted_entry_is_missed(path: Path, identity: Identity, seq: int) -> None:
    edit(path, ("DELETE FROM entries WHERE seq = ?", seq))

    with pytest.raises(LedgerCorrupt, match=f"entry {seq} is missing"):
        verify(path, identity)


@pytest.mark.parametrize("seq", range(1, ENTRIES - 1))
def test_entries_that_changed_places_are_found(path: Path, identity: Identity, seq: int) -> None:
    edit(
        path,
        ("UPDATE entries SET seq = -1 WHERE seq = ?", seq),
        ("UPDATE entries SET seq = ? WHERE seq = ?", seq, seq + 1),
        ("UPDATE entries SET seq = ? WHERE seq = -1", seq + 1),
    )

    with pytest.raises(LedgerCorrupt, match=f"entry {seq} says that it is entry {seq + 1}"):
        verify(path, identity)


@pytest.mark.parametrize("kept", range(1, ENTRIES))
def test_a_cut_off_end_shows_against_a_head_that_was_seen(
    path: Path, identity: Identity, kept: int
) -> None:
    head = head_of(path, identity)
    edit(path, ("DELETE FROM entries WHERE seq >= ?", kept))

    verify(path, identity)  # it is a valid ledger: of the past
    with pytest.raises(LedgerCorrupt, match="older copy"):
        verify(path, identity, against_head=head)


def test_a_restored_older_copy_that_went_on_is_found(
    path: Path, identity: Identity, tmp_path: Path
) -> None:
    older = Path(shutil.copy(path, tmp_path / "older.sqlite"))
    for file in (path, older):
        with Ledger.open(file, identity=identity, site="va", simulated=False) as ledger:
            event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=1)
            ledger.allot(study=file.name, event=event, max_epsilon=8, delta=DELTA, unit="patient")
    head = head_of(path, identity)
    shutil.copy(older, path)

    with pytest.raises(LedgerCorrupt, match="not the one that was seen"):
        verify(path, identity, against_head=head)


def test_a_file_that_is_swapped_under_a_running_site_is_found(
    path: Path, identity: Identity, tmp_path: Path
) -> None:
    older = Path(shutil.copy(path, tmp_path / "older.sqlite"))
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=1)
        ledger.allot(study="more", event=event, max_epsilon=8.0, delta=DELTA, unit="patient")
        path.write_bytes(older.read_bytes())  # the same file, so that the open handle sees it

        with pytest.raises(LedgerCorrupt, match="older"):
            ledger.reserve(study="more", round_number=1, event=event)


def test_a_ledger_under_another_key_is_not_the_sites(path: Path) -> None:
    with pytest.raises(LedgerCorrupt, match="signature"):
        verify(path, Identity.generate_site())


Change = Callable[[dict[str, Any]], None]


def rewrite(path: Path, identity: Identity, seq: int, change: Change) -> None:
    """What somebody with the site's key can do: change an entry, and sign all that follow."""
    previous, statements = "0" * 64, []
    for row in rows_of(path):
        body = json.loads(row.body)
        if row.seq == seq:
            change(body)
        content = {
            key: value
            for key, value in body.items()
            if key not in ("format", "seq", "previous", "time", "kind")
        }
        changed = write_body(body["kind"], content, seq=row.seq, previous=previous)
        new = sign_row(row.seq, changed, identity)
        previous = new.hash
        statements.append(
            (
                "UPDATE entries SET body = ?, signature = ? WHERE seq = ?",
                new.body,
                new.signature,
                row.seq,
            )
        )
    edit(path, *statements)


FORGERIES: list[tuple[int, Change, str]] = [
    (1, lambda body: body.update(epsilon=0.1), "entry 1 records epsilon 0.1"),
    (4, lambda body: body.update(epsilon=0.0), "entry 4 records epsilon 0.0"),
    (5, lambda body: body.update(spent=0.0), "entry 5 records epsilon 0.0"),
    (1, lambda body: body.update(max_epsilon=0.1), "allots more than its limit"),
    (2, lambda body: body["event"].update(count=21), "entry 2 does not make sense"),
    (2, lambda body: body["event"].update(count=2), "entry 4 records epsilon"),
    (2, lambda body: body.update(study="kidneys"), "no open allotment"),
    (2, lambda body: body.update(event={"event": "none"}), "unknown event"),
    (3, lambda body: body.update(reservation=1), "entry 3 does not make sense"),
    (7, lambda body: body.update(reservation=2), "settled twice"),
    (1, lambda body: body.update(unit="hospital"), "entry 1 does not make sense"),
]


@pytest.mark.parametrize(("seq", "change", "message"), FORGERIES)
def test_even_the_sites_own_key_cannot_make_the_sums_come_out_wrong(
    path: Path, identity: Identity, seq: int, change: Change, message: str
) -> None:
    head = head_of(path, identity)
    rewrite(path, identity, seq, change)

    with pytest.raises(LedgerCorrupt, match=message):
        verify(path, identity)
    with pytest.raises(LedgerCorrupt, match=r"entry \d"):
        verify(path, identity, against_head=head)


def test_a_history_that_was_rewritten_consistently_shows_against_a_head(
    path: Path, identity: Identity
) -> None:
    head = head_of(path, identity)
    rewrite(path, identity, 0, lambda body: body.update(ledger="0" * 32))

    verify(path, identity)
    with pytest.raises(LedgerCorrupt, match="not the one that was seen"):
        verify(path, identity, against_head=head)


@pytest.mark.parametrize("junk", [b"", b"not a ledger", bytes(4096)])
def test_a_file_that_is_no_ledger_is_reported(
    tmp_path: Path, identity: Identity, junk: bytes
) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(junk)

    with pytest.raises(LedgerCorrupt, match=r"cannot be|missing"):
        verify(path, identity)


@pytest.mark.parametrize("place", range(0, 24_000, 1500))
def test_a_damaged_file_never_passes(path: Path, identity: Identity, place: int) -> None:
    head = head_of(path, identity)
    content = bytearray(path.read_bytes())
    content[place : place + 600] = bytes(byte ^ 0xFF for byte in content[place : place + 600])
    path.write_bytes(bytes(content))

    try:
        verify(path, identity, against_head=head)
    except LedgerCorrupt:
        return
    # Where nothing was written, nothing was lost: every entry is as it was.
    assert head_of(path, identity) == head


def test_an_export_is_checked_away_from_the_site(path: Path, identity: Identity) -> None:
    with Ledger.read(path, public=identity.public) as ledger:
        exported = ledger.export()
    verify_export(exported, public=identity.public)

    cut, swapped, forged = (copy.deepcopy(exported) for _ in range(3))
    del cut["entries"][-1]
    swapped["entries"][2:4] = swapped["entries"][3:1:-1]
    forged["entries"][2]["body"] = canonical_json({"event": "none"}).decode()
    values: list[dict[str, Any]] = [cut, swapped, forged, {}, {"entries": 3}, {"entries": [{}]}]
    for bad in values:
        with pytest.raises(LedgerCorrupt):
            verify_export(bad, public=identity.public)


@pytest.mark.parametrize("head", ["", "12", "x:ab", "-1:ab"])
def test_a_head_has_a_form(path: Path, identity: Identity, head: str) -> None:
    with pytest.raises(ValueError, match="a head looks like"):
        verify(path, identity, against_head=head)
