"""Sweeps: every setting once for each seed, gone on with after a stop, one table at the end."""

import csv
import fcntl
import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from pyarrow import parquet
from studies import EPSILON_4, write_study

from fedward.console import print_sweep
from fedward.core.errors import ConfigError, RunError
from fedward.core.run import RunDirectory
from fedward.core.study import parse_study
from fedward.simulations.sweep import plan_sweep, run_sweep, write_toml
from fedward.simulations.sweep_pool import share_done
from fedward.simulations.sweep_results import write_results


def test_a_plan_has_every_combination_for_every_seed(tmp_path: Path) -> None:
    study = write_study(tmp_path, privacy=EPSILON_4, seed=7)

    points = plan_sweep(
        study, ["privacy.epsilon=1,2,4", "strategy.name=fedavg", "study.rounds=2,3"], seeds=2
    )

    assert len(points) == 3 * 1 * 2 * 2
    assert len({point.folder for point in points}) == len(points)
    for point in points:
        made = parse_study(point.text)
        assert made.privacy.epsilon == point.settings["privacy.epsilon"]
        assert made.study.rounds == point.settings["study.rounds"]
        assert made.study.seed in {7, 8}


def test_a_study_written_again_says_the_same(tmp_path: Path) -> None:
    extra = '[simulation]\nargs = { alpha = 0.5 }\nleave_out = ["va"]\ndropout = { rate = 0.2 }\n'
    values = tomllib.loads(write_study(tmp_path, extra=extra).read_text())

    assert tomllib.loads(write_toml(values)) == values


@pytest.mark.parametrize(
    ("axis", "says"),
    [
        ("privacy.epsilon", "is not an axis"),
        ("epsilon=1", "is not an axis"),
        ("privacy.epsilon=1,,2", "is not an axis"),
        ("privacy.epsilonn=1", "did you mean `epsilon`"),
        ("privacy.epsilon=-1", "is not allowed"),
        ("privacy.epsilon=1,1", "has a value twice"),
        ("study.seed=1,2", "is what --seeds varies"),
        ("study.name.x=1", "name is no table"),
        ("strategy.name=fedavg,nope", "strategy.name=nope.* is not known; allowed: fedavg"),
        ("model.name=logistic,nope", "is not a model of this task"),
        ("study.task=nope", "is not a known task"),
        ("simulation.partition=quantity", "needs num_sites"),
        ("simulation.malicious.sites=4", "needs? .*attack|attack is missing"),
        ("simulation.leave_out=0", "is not allowed"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_it_begins(
    tmp_path: Path, axis: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_sweep(write_study(tmp_path), [axis], seeds=2)


def test_a_sweep_runs_ends_in_a_table_and_is_not_run_again(tmp_path: Path) -> None:
    study = write_study(tmp_path, rounds=2)
    axes = ["privacy.epsilon=1,4", "training.learning_rate=0.5"]
    seen: list[tuple[int, int, float | None]] = []
    points = plan_sweep(study, axes, seeds=2)

    first = run_sweep(
        study, points, tmp_path / "out", workers=1, progress=lambda *at: seen.append(at)
    )
    (tmp_path / "out" / points[1].folder / "metrics.json").unlink()
    touched = (tmp_path / "out" / points[0].folder / "metrics.json").stat().st_mtime_ns
    second = run_sweep(study, points, tmp_path / "out", workers=1)

    assert [row["seeds"] for row in first["summary"]] == [2, 2]
    assert sorted(seen, key=lambda at: at[0]) == seen
    assert seen[-1][:2] == (4, 4)
    assert seen[-1][2] == 0
    assert (tmp_path / "out" / points[0].folder / "metrics.json").stat().st_mtime_ns == touched
    assert [r["pooled.auroc"] for r in second["runs"]] == [r["pooled.auroc"] for r in first["runs"]]
    with (tmp_path / "out" / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    table = parquet.read_table(tmp_path / "out" / "sweep.parquet")
    assert table.column("pooled.auroc").to_pylist() == [r["pooled.auroc"] for r in second["runs"]]
    assert set(table.column_names) == {name for row in second["runs"] for name in row}
    assert table.schema.metadata[b"private"] == b"false"
    assert table.column("private").to_pylist() == [False] * 4
    assert (first["private"], "seeds" in first["reason"]) == (False, True)
    picture = (tmp_path / "out" / "sweep.svg").read_text()
    assert picture.startswith("<svg")
    assert "not private" in picture
    assert not list(tmp_path.glob(".*.toml"))


def test_what_ended_of_another_study_is_not_taken_for_the_sweeps(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(tmp_path, plan_sweep(write_study(tmp_path, rounds=1), [], seeds=1), out, workers=1)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    other = plan_sweep(write_study(tmp_path, rounds=2), [], seeds=1)
    with pytest.raises(RunError, match="holds a run of another study; choose another folder"):
        run_sweep(tmp_path, other, out, workers=1)

    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    points = plan_sweep(write_study(tmp_path), [], seeds=1)
    with (tmp_path / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(RunError, match="another sweep is running"):
            run_sweep(tmp_path, points, tmp_path, workers=1)

    assert not (tmp_path / "points.json").exists()


def test_a_sweeps_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    points = plan_sweep(write_study(tmp_path), [], seeds=1)
    (tmp_path / "taken").touch()

    with pytest.raises(RunError, match=r"cannot be written: .*; choose another with --out"):
        run_sweep(tmp_path, points, tmp_path / "taken", workers=1)


def test_how_far_a_run_is_stands_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    assert share_done(tmp_path) == 0
    log.write_text('{"event": "started"}\n')
    assert share_done(tmp_path) == 0
    lines = [f'{{"event": "round", "round": {number}, "of": 9}}\n' for number in range(1, 7)]
    log.write_text("x" * 5000 + "\n" + "".join(lines) + '{"event": "late"}\n{"event": "rou')

    assert share_done(tmp_path) == pytest.approx(0.6)


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on_where_it_was(
    tmp_path: Path, how: signal.Signals
) -> None:
    # So many rounds that no run is over before the signal comes.
    write_study(tmp_path, rounds=300, extra='[simulation]\nengine = "per-site"\n')
    command = [
        *(sys.executable, "-m", "fedward.cli", "simulate", "study.toml"),
        *("--sweep", "privacy.clip_norm=0.5,1,2", "--workers", "2", "--out", "out"),
    ]
    sweep = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not any(share_done(run) > 0.02 for run in (tmp_path / "out").glob("clip*")):
        assert sweep.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()

    sweep.send_signal(how)
    _, said = sweep.communicate(timeout=60)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)
    stopped = [run for run in (tmp_path / "out").glob("clip*") if share_done(run) > 0.02]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert len(children) >= 2
    if how is signal.SIGINT:
        assert sweep.returncode == 130
        assert said.endswith("stopped; the same command goes on with the sweep\n")
        assert "Traceback" not in said
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]) == 3
    for run in stopped:
        events = list(RunDirectory.open(run).events())
        rounds = [event["round"] for event in events if event["event"] == "round"]
        # None twice: it went on from its checkpoint, of which it may not have told any more.
        assert len(rounds) == len(set(rounds))
        assert len(set(range(1, 301)) - set(rounds)) <= 1


def test_without_pyarrow_the_table_is_there_and_what_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it fails
    rows = [{"run": "a", "seconds": 1.0, "pooled.auroc": 0.8, "privacy.epsilon_spent": None}]

    result = write_results(rows, tmp_path, axes=[], failed={"b": "x"})
    print_sweep(result)

    assert result["parquet"] is None
    assert not (tmp_path / "sweep.parquet").exists()
    assert (tmp_path / "sweep.csv").read_text().splitlines()[1].startswith("a,1.0,0.8")
    said = capsys.readouterr().out
    assert "fedward[parquet]" in "".join(said.split())
    assert "failed: b: x" in said
    assert "not private" in said


def test_a_wide_table_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {f"simulation.args.a_name_of_{n}": "a-value-that-is-long" for n in range(6)}
    row = {**long, "run": "a", "seconds": 1.0, "pooled.auroc": 0.8, "privacy.epsilon_spent": 4.0}

    print_sweep(write_results([row], tmp_path, axes=list(long), failed={}))

    said = capsys.readouterr().out
    assert said.count("a-value-that-is-long") == 6
    assert "…" not in said


def test_the_command_line_sweeps(tmp_path: Path) -> None:
    write_study(tmp_path, rounds=1)

    done = subprocess.run(
        [
            *(sys.executable, "-m", "fedward.cli", "simulate", "study.toml", "--json"),
            *("--sweep", "privacy.clip_norm=0.5,1", "--workers", "1", "--out", "out"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=200,
    )

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [row["privacy.clip_norm"] for row in answer["summary"]] == [0.5, 1.0]
    assert not answer["failed"]
