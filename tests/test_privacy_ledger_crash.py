from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedward.core.errors import ConfigError, PrivacyError
from fedward.core.identity import Identity
from fedward.privacy.accounting import dp_sgd_event, privacy_spent
from fedward.privacy.ledger import Ledger

DELTA = 1e-5
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "ledger_crash.py"

needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc")), reason="the fault injector is compiled"
)


def crash(*arguments: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@needs_compiler
def test_a_site_killed_at_any_write_never_says_less_than_what_left() -> None:
    result = crash("--kills", "30")

    assert [bar for bar in result["bars"] if not bar["holds"]] == []
    assert result["bars"][0]["value"] == 30
    assert result["writes_of_a_whole_life"] > 50


@needs_compiler
def test_a_site_that_reserves_too_late_is_caught() -> None:
    result = crash("--kills", "20", "--broken")

    missed = {bar["name"] for bar in result["bars"] if not bar["holds"]}
    assert "ledger says less than what left" in missed


RIVAL = """
import sys
from pathlib import Path
from fedward.core.errors import BudgetExceeded
from fedward.core.identity import Identity
from fedward.privacy.accounting import dp_sgd_event
from fedward.privacy.ledger import Ledger

folder, study, limit = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=20)
identity = Identity.load(folder / "site.key")
with Ledger.open(folder / "ledger.sqlite", identity=identity, site="va", simulated=False) as ledger:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        ledger.allot(study=study, event=event, max_epsilon=limit, delta=1e-5, unit="patient")
    except BudgetExceeded:
        print("refused")
    else:
        ledger.reserve(study=study, round_number=1, event=event)
        print("granted")
"""


def test_of_two_studies_at_once_one_is_granted_what_only_one_can_have(tmp_path: Path) -> None:
    identity = Identity.generate_site()
    identity.save(tmp_path / "site.key")
    event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=20)
    alone = privacy_spent(event, delta=DELTA, unit="patient").epsilon
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(tmp_path), f"study-{number}", str(alone * 1.2)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"

    for rival in rivals:  # all are waiting; now all at once
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    answers = [rival.communicate()[0].strip() for rival in rivals]

    assert sorted(answers) == ["granted", "refused", "refused"]
    with Ledger.read(tmp_path / "ledger.sqlite", public=identity.public) as ledger:
        ledger.verify()
        assert ledger.spent(DELTA).epsilon == pytest.approx(alone)


def test_threads_share_a_ledger(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=1)
    identity = Identity.generate_site()
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        ledger.allot(
            study="heart",
            event=dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=20),
            max_epsilon=8.0,
            delta=DELTA,
            unit="patient",
        )

        def one_round(number: int) -> None:
            reservation = ledger.reserve(study="heart", round_number=number, event=event)
            ledger.settle(reservation, update_digest=f"{number:064x}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one_round, range(1, 21)))

        ledger.verify()
        settled = [entry for entry in ledger.entries() if entry.state == "settled"]
        assert len(settled) == 20


def test_a_ledger_is_not_carried_over_a_fork(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from fedward.core.identity import Identity;"
        "from fedward.privacy.ledger import Ledger;"
        "l = Ledger.open(Path(sys.argv[1]), identity=Identity.generate_site(), site='va',"
        " simulated=False); child = os.fork()\n"
        "if child:\n os.waitpid(child, 0)\n"
        "else:\n try:\n  l.head\n except ValueError as error:\n  print(error)\n"
    )

    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "ledger.sqlite")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "must not be carried over a fork" in run.stdout


def test_a_full_disk_is_explained_and_nothing_is_granted(tmp_path: Path) -> None:
    event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=20)
    path, identity = tmp_path / "ledger.sqlite", Identity.generate_site()
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        ledger.allot(study="heart", event=event, max_epsilon=8.0, delta=DELTA, unit="patient")
        connection = ledger._journal._connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        part = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=1)

        def reserve_all() -> None:
            for number in range(1, 21):
                ledger.reserve(study="heart", round_number=number, event=part)
                granted.append(number)

        granted: list[int] = []
        with pytest.raises(PrivacyError, match=r"full.*nothing was released"):
            reserve_all()

        connection.execute("PRAGMA max_page_count = 1000000")
        ledger.verify()
        reserved = [entry.round_number for entry in ledger.entries() if entry.kind == "reserve"]
        assert reserved == granted
        ledger.reserve(study="heart", round_number=20, event=part)


def test_a_ledger_that_somebody_holds_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward.privacy.ledger.storage._BUSY_SECONDS", 0.05)
    event = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.1, steps=20)
    path, identity = tmp_path / "ledger.sqlite", Identity.generate_site()
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(PrivacyError, match="locked"):
            ledger.allot(study="heart", event=event, max_epsilon=8, delta=DELTA, unit="patient")

        other.execute("ROLLBACK")
        other.close()
        ledger.allot(study="heart", event=event, max_epsilon=8.0, delta=DELTA, unit="patient")


def test_a_folder_that_is_not_the_sites_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be written"):
        Ledger.open(
            tmp_path / "file" / "ledger.sqlite",
            identity=Identity.generate_site(),
            site="va",
            simulated=False,
        )
