"""The audit log: durable in groups, and a change anywhere in it is located."""

import json
import random
from pathlib import Path

import pytest
from release_samples import publish_sample
from serving_client import ask

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.audit import AuditCorrupt, AuditLog, verify_log
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.service import Service


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "audit.jsonl"
    with AuditLog(file) as log:
        for number in range(20):
            log.append("predict", caller="ward 3", model="tiny", version=1, rows=number)
    return file


def test_what_was_appended_verifies_in_order(file: Path) -> None:
    count, head = verify_log(file)

    rows = [json.loads(line)["rows"] for line in file.read_text().splitlines()]
    assert (count, rows) == (20, list(range(20)))
    assert len(head) == 64


def test_a_log_is_continued(file: Path) -> None:
    with AuditLog(file) as log:
        log.append("roll-back", model="tiny", version=1)
        log.flush()
        assert verify_log(file) == (21, log.head)


def test_flush_returns_when_all_is_on_disk(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "a.jsonl") as log:
        for _ in range(100):
            log.append("predict")
        log.flush()

        assert verify_log(tmp_path / "a.jsonl")[0] == 100


def test_a_flipped_bit_is_located(file: Path) -> None:
    original = file.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        position = rng.randrange(len(original))
        changed = bytearray(original)
        changed[position] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        line = original[:position].count(b"\n") + 1

        with pytest.raises(AuditCorrupt) as caught:
            verify_log(file)

        assert caught.value.line == line


@pytest.mark.parametrize("victim", [0, 7, 18])
def test_a_removed_line_is_located(file: Path, victim: int) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:victim] + lines[victim + 1 :]))

    with pytest.raises(AuditCorrupt) as caught:
        verify_log(file)
    assert caught.value.line == victim + 1


def test_moved_lines_are_located(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3], lines[4] = lines[4], lines[3]
    file.write_bytes(b"".join(lines))

    with pytest.raises(AuditCorrupt) as caught:
        AuditLog(file)
    assert caught.value.line == 4


def test_a_torn_last_line_of_a_crash_is_cut_off(file: Path) -> None:
    with file.open("ab") as log:
        log.write(b'{"action":"pred')

    with AuditLog(file) as again:
        again.append("predict")

    assert verify_log(file)[0] == 21


def test_requests_are_recorded_without_a_patients_value(tmp_path: Path) -> None:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path / "registry", identity)
    catalogue = Catalogue([start_engine(read_release(folder, identity.public))])
    with AuditLog(tmp_path / "audit.jsonl") as log:
        app = App(Service(catalogue, audit=log))
        ask(app, "POST", "/predict", {"age": 63.25, "cholesterol": 241.5})
        ask(app, "POST", "/predict", {"age": 63.25, "cholesterol": 98765})

    entries = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(e["action"], e["caller"], e["version"]) for e in entries] == [
        ("predict", "anonymous", 1)
    ]
    text = (tmp_path / "audit.jsonl").read_text()
    assert "63.25" not in text
    assert "241.5" not in text
