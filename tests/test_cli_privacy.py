"""A hospital looks at its ledger and audits its trainer, from the command line."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from studies import CSV_SITE
from torch import nn

from fedward.cli import main
from fedward.client import conformance
from fedward.client.training.parts import Loss
from fedward.client.training.plan import Mode
from fedward.client.training.trial import trainer_of
from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.accounting import dp_sgd_event
from fedward.privacy.audits.conformance import Trainer
from fedward.privacy.ledger import Ledger, verify_export

DELTA = 1e-5
ROUNDS = {"first": 3, "second": 2}


@dataclass
class Done:
    """As of a process, without the second that each would need to start."""

    returncode: int
    stdout: str
    stderr: str


def fedward(*arguments: str | Path, cwd: Path) -> Done:
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["fedward", *map(str, arguments)]
    try:
        with contextlib.chdir(cwd), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real site's folder, after two studies; the copy `older` lacks the second."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "site.toml").write_text(CSV_SITE)
    identity = Identity.generate_site()
    identity.save(folder / "state" / "identity.pem")
    path = folder / "state" / "ledger.sqlite"
    for study, rounds in ROUNDS.items():
        with Ledger.open(path, identity=identity, site="st-elsewhere", simulated=False) as ledger:
            one = dp_sgd_event(noise_multiplier=2.0, sample_rate=0.2, steps=10)
            whole = dp_sgd_event(noise_multiplier=2.0, sample_rate=0.2, steps=10 * rounds)
            ledger.allot(study=study, event=whole, max_epsilon=8.0, delta=DELTA, unit="patient")
            for number in range(1, rounds + 1):
                reservation = ledger.reserve(study=study, round_number=number, event=one)
                ledger.settle(reservation, update_digest="ab" * 32)
        if study == "first":
            shutil.copy(path, folder / "older")
    return folder


@pytest.fixture
def site(kept: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path


def head_of(site: Path) -> str:
    public = Identity.load(site / "state" / "identity.pem").public
    with Ledger.read(site / "state" / "ledger.sqlite", public=public) as ledger:
        return ledger.head


def test_show_draws_the_budget_over_time_and_needs_no_torch(kept: Path) -> None:
    code = (
        "import sys; sys.argv = ['fedward', 'ledger', 'show', 'site.toml']\n"
        "from fedward import cli\n"
        "try: cli.main()\n"
        "finally: print('torch' if 'torch' in sys.modules else 'light')"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=kept,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert "█" in done.stdout
    assert "of 8" in done.stdout
    assert "first" in done.stdout
    assert "second" in done.stdout
    assert done.stdout.strip().endswith("light")


def test_show_says_what_each_study_and_all_together_cost(kept: Path) -> None:
    value = json.loads(fedward("ledger", "show", "site.toml", "--json", cwd=kept).stdout)

    by_study = {study["study"]: study for study in value["studies"]}
    history = [point["epsilon"] for point in value["history"]]
    assert {name: study["rounds"] for name, study in by_study.items()} == ROUNDS
    assert value["spent"]["epsilon"] < sum(study["epsilon"] for study in by_study.values())
    assert history == sorted(history)
    assert history[-1] == pytest.approx(value["spent"]["epsilon"])
    assert [point["study"] for point in value["history"]] == ["first"] * 3 + ["second"] * 2


def test_an_export_can_be_verified_elsewhere(kept: Path, tmp_path: Path) -> None:
    public = PublicIdentity.from_pem((kept / "state" / "identity.pem.pub").read_bytes())
    printed = fedward("ledger", "export", "site.toml", cwd=kept)
    written = fedward(
        "ledger", "export", "site.toml", "--out", tmp_path / "out.json", "--json", cwd=kept
    )

    value = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(printed.stdout) == value
    assert json.loads(written.stdout)["head"] == value["head"] == head_of(kept)
    assert verify_export(value, public=public).genesis["site"] == "st-elsewhere"


def test_verify_knows_a_head_that_is_in_the_ledger(kept: Path) -> None:
    done = fedward("ledger", "verify", "site.toml", "--head", head_of(kept), cwd=kept)

    assert done.returncode == 0, done.stderr
    assert head_of(kept) in done.stdout


def test_an_older_copy_is_found_out_by_a_newer_head(site: Path) -> None:
    head = head_of(site)
    shutil.copy(site / "older", site / "state" / "ledger.sqlite")

    alone = fedward("ledger", "verify", "site.toml", cwd=site)
    done = fedward("ledger", "verify", "site.toml", "--head", head, cwd=site)

    assert alone.returncode == 0, alone.stderr
    assert done.returncode == 1
    assert "older copy" in done.stderr
    assert f"entry {head.partition(':')[0]}" in done.stderr


def test_an_older_copy_is_found_out_by_the_last_release(site: Path) -> None:
    release = site / "store" / "inbox" / "heart-000001"
    release.mkdir(parents=True)
    statement = {"sites": {"st-elsewhere": {"ledger_head": head_of(site)}, "other": {}}}
    (release / "privacy.json").write_text(json.dumps(statement))
    (site / "store" / "privacy.json").write_text("{")  # damaged: says nothing

    before = fedward("ledger", "verify", "site.toml", cwd=site)
    shutil.copy(site / "older", site / "state" / "ledger.sqlite")
    after = fedward("ledger", "verify", "site.toml", cwd=site)

    assert before.returncode == 0, before.stderr
    assert "release(s) in the store" in before.stdout
    assert after.returncode == 1
    assert "older copy" in after.stderr
    assert "heart-000001" in after.stderr


def test_a_head_that_is_none_is_bad_usage(kept: Path) -> None:
    assert fedward("ledger", "verify", "site.toml", "--head", "latest", cwd=kept).returncode == 2


# A round at less noise than it was reserved for.
FORGED = "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), '2.0', '9.0') AS BLOB) "


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        (FORGED + "WHERE seq = 4", "entry 4 does not make sense: .* more than it was allotted"),
        ("UPDATE entries SET signature = zeroblob(64) WHERE seq = 3", "entry 3: "),
        ("DELETE FROM entries WHERE seq = 4", "entry 4 is missing"),
        ("DELETE FROM entries WHERE seq = 0", "entry 0 is missing"),
        (
            "UPDATE entries SET body = (SELECT body FROM entries WHERE seq = 3) WHERE seq = 4",
            "entry 4 says that it is entry 3",
        ),
    ],
)
def test_what_was_changed_in_the_file_is_said(site: Path, statement: str, where: str) -> None:
    file = sqlite3.connect(site / "state" / "ledger.sqlite")
    for trigger in ("entries_never_change", "entries_never_go"):
        file.execute(f"DROP TRIGGER {trigger}")
    changed = file.execute(statement).rowcount
    file.commit()
    file.close()

    text = fedward("ledger", "verify", "site.toml", cwd=site)
    as_json = fedward("ledger", "verify", "site.toml", "--json", cwd=site)

    assert changed > 0
    assert (text.returncode, as_json.returncode) == (1, 1)
    assert re.search(where, text.stderr), text.stderr
    assert len(text.stderr.strip().splitlines()) <= 2
    error = json.loads(as_json.stdout)["error"]
    assert error["kind"] == "LedgerCorrupt"
    assert re.search(where, error["message"])


def test_the_ledger_of_another_site_is_not_shown(site: Path) -> None:
    (site / "site.toml").write_text(CSV_SITE.replace("st-elsewhere", "general"))

    done = fedward("ledger", "show", "site.toml", cwd=site)

    assert done.returncode == 1
    assert "is the ledger of st-elsewhere" in done.stderr


def test_a_site_that_has_not_trained_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(CSV_SITE)

    done = fedward("ledger", "show", "site.toml", cwd=tmp_path)

    assert done.returncode == 1
    assert "has not trained yet" in done.stderr


def test_the_trainer_conforms_and_the_audit_says_how_it_knows(tmp_path: Path) -> None:
    done = fedward("audit", "--conformance", "--mode", "closed-form", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["passed"]
    [result] = value["results"]
    assert (result["family"], result["mode"]) == ("logistic", "closed-form")
    assert [check["p_value"] is None for check in result["checks"]] == [False, True, False, True]


def test_a_trainer_that_does_not_conform_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def too_quiet(build: Callable[[], nn.Module], loss: Loss, *, mode: Mode) -> Trainer:
        right = trainer_of(build, loss, mode=mode)
        return lambda trial: right(
            dataclasses.replace(trial, noise_multiplier=0.9 * trial.noise_multiplier)
        )

    monkeypatch.setattr(conformance, "trainer_of", too_quiet)

    done = fedward("audit", "--conformance", "--mode", "closed-form", "--json", cwd=tmp_path)

    assert done.returncode == 1
    [result] = json.loads(done.stdout)["results"]
    assert [check["passed"] for check in result["checks"]] == [False, True, True, True]


@pytest.mark.parametrize("arguments", [[], ["--conformance", "--mode", "abacus"]])
def test_an_audit_of_nothing_is_bad_usage(arguments: list[str], tmp_path: Path) -> None:
    assert fedward("audit", *arguments, cwd=tmp_path).returncode == 2
