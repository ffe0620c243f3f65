"""Patients' values in the audit log: sealed, opened by id, erased without breaking the chain."""

import base64
import hashlib
import hmac
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from release_samples import publish_sample
from serving_client import ask

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.__main__ import main
from fedward.serving.app import App
from fedward.serving.audit import AuditLog, read_log, verify_log
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.gate import Gate, add_key, read_keys
from fedward.serving.service import Service
from fedward.serving.vault import Vault, VaultError

_VALUES = {"age": 63.0, "cholesterol": None}
_LINE = "predict/tiny/1"


class Ward:
    """An adapter that keeps values, in this process."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "store" / "state"
        self.file = self.state / "audit.jsonl"
        identity = Identity.generate_publisher()
        engine = start_engine(
            read_release(publish_sample(folder / "registry", identity), identity.public)
        )
        self.vault = Vault(self.state)
        self.key = add_key(self.state / "keys.json", name="it", role="operator")
        self.ward = add_key(self.state / "keys.json", name="ward", role="clinician")
        self.log = AuditLog(self.file, vault=self.vault)
        gate = Gate(read_keys(self.state / "keys.json"))
        self.app = App(Service(Catalogue([engine]), gate, audit=self.log, vault=self.vault))

    def predict(self, patient: str | None, age: float) -> int:
        headers = {"Authorization": f"Bearer {self.ward}"}
        headers |= {} if patient is None else {"X-Patient-Id": patient}
        return ask(self.app, "POST", "/predict", {"age": age, "sex": "male"}, headers).status

    def erase(self, patient: Any, key: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return ask(self.app, "POST", "/manage/erase", {"patient": patient}, headers)

    def ages(self, patient: str) -> list[float]:
        self.log.flush()
        return [line["values"]["age"] for line in self.vault.show(patient, read_log(self.file))]


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(tmp_path)
    with ward.log:
        yield ward


def test_a_line_holds_neither_id_nor_value_and_opens_by_the_id(ward: Ward) -> None:
    assert ward.predict("MRN-4711", 63.25) == 200
    assert ward.predict("MRN-4711", 64.5) == 200
    assert ward.predict("MRN-0815", 71.125) == 200
    assert ward.predict(None, 80.0) == 200

    assert ward.ages("MRN-4711") == [63.25, 64.5]
    assert ward.ages("MRN-0815") == [71.125]
    assert ward.ages("nobody") == []
    for file in ward.state.iterdir():
        data = file.read_bytes()
        assert not any(secret in data for secret in (b"MRN", b"63.25", b"64.5", b"71.125"))
    lines = list(read_log(ward.file))
    assert ["values" in line for line in lines] == [True, True, True, False]
    assert lines[0]["values"] != lines[1]["values"]


def test_erasure_leaves_the_chain_and_nothing_that_opens(ward: Ward) -> None:
    ward.predict("MRN-4711", 63.25)
    ward.predict("MRN-0815", 71.125)
    ward.log.flush()
    before = verify_log(ward.file)
    token = next(read_log(ward.file))["patient"]

    answer = ward.erase("MRN-4711")

    assert (answer.status, answer.json) == (200, {"erased": True})
    assert ward.ages("MRN-4711") == []
    assert ward.ages("MRN-0815") == [71.125]
    count, _ = verify_log(ward.file)
    assert count == before[0] + 1  # that somebody was erased, and by whom
    last = list(read_log(ward.file))[-1]
    assert (last["action"], last["caller"]) == ("erased", "it")
    assert token.encode() not in (ward.state / "vault.db").read_bytes()
    assert ward.erase("MRN-4711").json == {"erased": False}
    # Who comes again is somebody new: old lines stay closed.
    ward.predict("MRN-4711", 65.0)
    assert ward.ages("MRN-4711") == [65.0]


def test_only_an_operator_erases_and_says_whom(ward: Ward) -> None:
    assert ward.erase("MRN-4711", ward.ward).status == 403
    assert ward.erase(None).status == 400
    assert ward.erase("").status == 400
    assert ward.erase("x" * 129).status == 400
    assert ward.predict("a\x7fb", 60) == 400


def test_a_line_opens_with_the_two_keys_by_the_standard(ward: Ward) -> None:
    ward.predict("MRN-4711", 63.25)
    ward.log.flush()
    line = next(read_log(ward.file))
    master = json.loads((ward.state / "vault.key").read_bytes())
    pseudonym = hmac.new(bytes.fromhex(master["index"]), b"MRN-4711", hashlib.sha256).digest()
    with sqlite3.connect(ward.state / "vault.db") as database:
        query = "SELECT token, sealed FROM patients WHERE pseudonym = ?"
        token, sealed = database.execute(query, (pseudonym,)).fetchone()
    database.close()
    key = AESGCM(bytes.fromhex(master["key"])).decrypt(sealed[:12], sealed[12:], token.encode())
    packed = base64.b64decode(line["values"])
    plain = AESGCM(key).decrypt(packed[:12], packed[12:], f"{token}/predict/tiny/1".encode())

    assert line["patient"] == token
    assert json.loads(plain) == {"age": 63.25, "sex": 1, "cholesterol": None, "smoker": None}
    for name in ("vault.db", "vault.key"):
        assert (ward.state / name).stat().st_mode & 0o077 == 0


def test_a_new_master_key_opens_what_the_old_one_sealed_and_the_old_one_nothing(
    tmp_path: Path,
) -> None:
    vault = Vault(tmp_path)
    sealed = {"action": "predict", "model": "tiny", "version": 1}
    line = {**sealed, **vault.seal("a", _VALUES, line=_LINE)}
    old = (tmp_path / "vault.key").read_bytes()

    assert not vault.rotate(after=3600)
    assert vault.rotate()

    assert vault.show("a", iter([line]))[0]["values"] == _VALUES
    assert json.loads(old)["key"] not in (tmp_path / "vault.key").read_text()
    (tmp_path / "vault.key").write_bytes(old)
    with pytest.raises(VaultError, match="restore both together"):
        vault.show("a", iter([line]))


def test_a_crash_while_the_master_key_is_replaced_loses_no_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(tmp_path)
    sealed = {"action": "predict", "model": "tiny", "version": 1}
    line = {**sealed, **vault.seal("a", _VALUES, line=_LINE)}
    write = Vault._write_master
    for step in (1, 2):
        calls: list[Any] = []

        def failing(self: Vault, value: Any, step: int = step, calls: list[Any] = calls) -> None:
            calls.append(value)
            if len(calls) == step:
                if step == 1:
                    write(self, value)  # on disk, and the database has not changed over
                raise OSError("power cut")
            write(self, value)

        monkeypatch.setattr(Vault, "_write_master", failing)
        with pytest.raises(OSError, match="power cut"):
            vault.rotate()
        monkeypatch.setattr(Vault, "_write_master", write)

        again = Vault(tmp_path)
        assert again.show("a", iter([line]))[0]["values"] == _VALUES
        assert again.rotate()
        assert again.show("a", iter([line]))[0]["values"] == _VALUES


@pytest.mark.parametrize("change", [{"version": 2}, {"action": "explain"}, {"model": "other"}])
def test_values_moved_to_another_line_do_not_open(tmp_path: Path, change: dict[str, Any]) -> None:
    vault = Vault(tmp_path)
    sealed = vault.seal("a", _VALUES, line=_LINE)
    line = {"action": "predict", "model": "tiny", "version": 1, **sealed, **change}

    with pytest.raises(VaultError):
        vault.show("a", iter([line]))


def test_a_lost_key_is_said_and_not_made_anew(tmp_path: Path) -> None:
    Vault(tmp_path).seal("a", _VALUES, line=_LINE)
    (tmp_path / "vault.key").unlink()

    with pytest.raises(VaultError, match="missing"):
        Vault(tmp_path)


def test_a_vault_that_fails_loses_values_and_no_line(ward: Ward) -> None:
    (ward.state / "vault.key").write_text("{}")
    ward.predict("MRN-4711", 63.25)
    ward.predict(None, 64)
    ward.log.flush()

    lines = list(read_log(ward.file))
    assert [line.get("values") for line in lines] == ["not kept", None]
    assert verify_log(ward.file)[0] == 2


def test_without_the_option_an_id_changes_nothing(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as log:
        log.append("predict", patient=("MRN-4711", _VALUES), model="tiny", version=1)

    (line,) = read_log(tmp_path / "audit.jsonl")
    assert "patient" not in line
    assert "values" not in line


def test_the_command_line_shows_and_erases(ward: Ward, capsys: pytest.CaptureFixture[str]) -> None:
    ward.predict("MRN-4711", 63.25)
    ward.log.flush()
    store = str(ward.state.parent)

    assert main(["values", "rotate", "--store", store]) == 0
    assert main(["values", "show", "--store", store, "MRN-4711"]) == 0
    assert json.loads(capsys.readouterr().out)["values"]["age"] == 63.25
    assert main(["values", "erase", "--store", store, "MRN-4711"]) == 0
    assert main(["values", "show", "--store", store, "MRN-4711"]) == 0
    assert capsys.readouterr().out == "erased\n"
