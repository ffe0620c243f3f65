"""The command line, as a person or a script meets it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import CSV_SITE, write_study

from fedward.console import print_status

ROW = {
    "pid": "p1",
    "age": "63",
    "sex": "male",
    "chest_pain": "asymptomatic",
    "resting_blood_pressure": "140",
    "cholesterol": "240",
    "high_fasting_glucose": "0",
    "resting_ecg": "normal",
    "max_heart_rate": "150",
    "exercise_angina": "0",
    "st_depression": "1.2",
    "st_slope": "",
    "vessels_fluoroscopy": "",
    "thallium_scan": "",
    "heart_disease": "1",
}


def fedward(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedward.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_study(folder, rounds=4)
    done = fedward("simulate", "study.toml", "--out", "run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "answer.json").write_text(done.stdout)
    return folder


def test_simulate_prints_one_object_that_is_also_on_disk(finished: Path) -> None:
    answer = json.loads((finished / "answer.json").read_text())
    on_disk = json.loads((finished / "run" / "metrics.json").read_text())

    assert answer == on_disk
    assert set(answer["metrics"]) == {"pooled", "mean", "worst", "sites"}
    assert answer["privacy"]["sites"]["va"]["epsilon"] <= 4.0
    assert answer["privacy"]["neighboring_relation"] == "add-or-remove-one"


def test_a_run_that_is_stopped_says_how_it_goes_on(tmp_path: Path) -> None:
    write_study(tmp_path, rounds=5000)
    command = [sys.executable, "-m", "fedward.cli", "simulate", "study.toml", "--out", "run"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list((tmp_path / "run" / "checkpoints").glob("*")):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)

    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)

    assert run.returncode == 130
    assert said == "stopped; the run goes on with --resume run\n"


def test_what_is_said_of_a_refusal_keeps_its_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    trouble = {"event": "refused", "node": "2", "reason": "raise [policy] max_epsilon"}
    status = {"study": "s", "state": "aborted", "round": 0, "rounds": 4, "troubles": [trouble]}

    print_status({**status, "happened": ["release not taken; a: refuses by [serving] publisher"]})

    said = capsys.readouterr().out
    assert "  refused: node 2: raise [policy] max_epsilon\n" in said
    assert "  release not taken; a: refuses by [serving] publisher\n" in said


def test_a_run_directory_is_self_contained(finished: Path) -> None:
    names = {path.name for path in (finished / "run").iterdir()}

    assert {
        "study.toml",
        "events.jsonl",
        "metrics.json",
        "manifest.json",
        "checkpoints",
        "release",
        "report.html",
    } <= names


def test_status_ledger_and_registry_read_what_the_run_wrote(finished: Path) -> None:
    site = "run/sites/cleveland.toml"
    status = json.loads(fedward("status", "run", "--json", cwd=finished).stdout)
    shown = json.loads(fedward("ledger", "show", site, "--json", cwd=finished).stdout)
    verified = fedward("ledger", "verify", site, cwd=finished)
    release = fedward(
        *("registry", "verify", "run/release", "--publisher", "run/keys/publisher.pem.pub"),
        cwd=finished,
    )

    assert (status["state"], status["round"]) == ("finished", 4)
    assert shown["spent"]["epsilon"] == pytest.approx(4.0, abs=0.1)
    assert shown["simulated"]
    assert verified.returncode == 0
    assert "verify" in verified.stdout
    assert release.returncode == 0, release.stderr


def test_a_human_reads_tables(finished: Path) -> None:
    ledger = fedward("ledger", "show", "run/sites/cleveland.toml", cwd=finished).stdout
    tasks = fedward("tasks", cwd=finished).stdout

    assert "of 8" in ledger
    assert "not" in ledger
    assert "heart-disease" in tasks


def test_a_release_with_one_flipped_bit_is_refused(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished / "run" / "release", tmp_path / "release")
    weights = tmp_path / "release" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    done = fedward(
        "registry",
        "verify",
        "release",
        "--publisher",
        finished / "run/keys/publisher.pem.pub",
        cwd=tmp_path,
    )

    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.parametrize("as_json", [False, True])
def test_a_misspelt_key_ends_with_1_and_writes_nothing(tmp_path: Path, as_json: bool) -> None:
    file = write_study(tmp_path)
    file.write_text(file.read_text().replace("epsilon", "epsilonn"))

    done = fedward("simulate", "study.toml", *(["--json"] if as_json else []), cwd=tmp_path)

    assert done.returncode == 1
    said = json.loads(done.stdout)["error"]["message"] if as_json else done.stderr
    assert "study.toml:20: [privacy] epsilonn is not a known key; did you mean `epsilon`?" in said
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def csv_of(*rows: dict[str, str]) -> str:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


def test_a_hospitals_own_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(CSV_SITE)
    (tmp_path / "patients.csv").write_text(csv_of(ROW, ROW | {"pid": "p2", "age": ""}))

    done = fedward("site", "check", "site.toml", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"] == {"heart-disease": {"patients": 2, "rows": 2}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (csv_of({k: v for k, v in ROW.items() if k != "cholesterol"}), ["cholesterol", "missing"]),
        (csv_of(ROW, ROW | {"pid": "p2", "age": "430"}), ["row 3", "age", "18 to 120|to"]),
        (csv_of(ROW | {"age": "sixty"}), ["row 2", "age", "number"]),
        (csv_of(ROW, ROW), ["row 3", "pid", "the same patient is in row 2"]),
        (csv_of(ROW).splitlines()[0] + "\n", ["patients.csv", "no "]),
        ("", ["patients.csv", "empty"]),
    ],
)
def test_a_csv_that_cannot_be_used_ends_with_1(tmp_path: Path, text: str, says: list[str]) -> None:
    (tmp_path / "site.toml").write_text(CSV_SITE)
    (tmp_path / "patients.csv").write_text(text)

    done = fedward("site", "check", "site.toml", cwd=tmp_path)

    assert done.returncode == 1
    assert all(re.search(words, done.stderr) for words in says), done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "430" not in done.stderr
    assert "sixty" not in done.stderr


def test_bad_usage_ends_with_2(tmp_path: Path) -> None:
    write_study(tmp_path)

    assert fedward("simulate", cwd=tmp_path).returncode == 2
    assert fedward("simulate", "study.toml", "--runtime", "abacus", cwd=tmp_path).returncode == 2


def test_a_run_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    done = fedward("status", "nowhere", cwd=tmp_path)

    assert done.returncode == 1
    assert "not a run directory" in done.stderr
