"""Sweeps: every setting once for each seed, gone on with after a stop, one table at the end."""

import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pyarrow import parquet
from studies import EPSILON_4, write_study

from fedward.console import print_sweep
from fedward.core.errors import ConfigError
from fedward.core.study import parse_study
from fedward.simulations.sweep import plan_sweep, run_sweep, write_toml
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
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_it_begins(
    tmp_path: Path, axis: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_sweep(write_study(tmp_path), [axis], seeds=1)


def test_a_sweep_runs_ends_in_a_table_and_is_not_run_again(tmp_path: Path) -> None:
    study = write_study(tmp_path, rounds=2)
    axes = ["privacy.epsilon=1,4", "training.learning_rate=0.5"]
    seen: list[tuple[int, int, float]] = []
    points = plan_sweep(study, axes, seeds=2)

    first = run_sweep(
        study, points, tmp_path / "out", workers=1, progress=lambda *at: seen.append(at)
    )
    (tmp_path / "out" / points[1].folder / "metrics.json").unlink()
    touched = (tmp_path / "out" / points[0].folder / "metrics.json").stat().st_mtime_ns
    second = run_sweep(study, points, tmp_path / "out", workers=1)

    assert [row["seeds"] for row in first["summary"]] == [2, 2]
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][2] == 0
    assert (tmp_path / "out" / points[0].folder / "metrics.json").stat().st_mtime_ns == touched
    assert [r["pooled.auroc"] for r in second["runs"]] == [r["pooled.auroc"] for r in first["runs"]]
    with (tmp_path / "out" / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    table = parquet.read_table(tmp_path / "out" / "sweep.parquet")
    assert table.column("pooled.auroc").to_pylist() == [r["pooled.auroc"] for r in second["runs"]]
    assert set(table.column_names) == {name for row in second["runs"] for name in row}
    assert (tmp_path / "out" / "sweep.svg").read_text().startswith("<svg")
    assert not list(tmp_path.glob(".*.toml"))


def test_without_pyarrow_the_table_is_there_and_what_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it fails
    rows = [{"run": "a", "seconds": 1.0, "pooled.auroc": 0.8, "privacy.epsilon_spent": None}]

    result = write_results(rows, tmp_path, axes=[], failed={})
    print_sweep(result)

    assert result["parquet"] is None
    assert not (tmp_path / "sweep.parquet").exists()
    assert (tmp_path / "sweep.csv").read_text().splitlines()[1].startswith("a,1.0,0.8")
    assert "fedward[parquet]" in "".join(capsys.readouterr().out.split())


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
