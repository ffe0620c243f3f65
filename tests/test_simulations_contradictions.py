"""Scenarios that cannot be, or cannot be with the rest of a study: said, and nothing is left."""

from pathlib import Path

import numpy as np
import pytest
from studies import EPSILON_4, NO_PRIVACY, change, write_study
from test_simulate import model_of
from test_simulations_scenarios import TEN, rounds_of, run_with

from fedward.core.errors import AggregationAborted, ConfigError, RunError
from fedward.core.run import RunDirectory
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, simulate

DISTRIBUTED = 'mode = "distributed"\nepsilon = 4.0'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("dropout = { rate = 0.3, mean_length = 2.0 }", 'mean_length belongs to kind = "bursty"'),
        ('dropout = { kind = "bursty", rate = 0.9 }', "needs a mean_length of 9 rounds"),
        ('stragglers = { distribution = "exponential", spread = 2.0 }', "remove spread"),
        ('malicious = { attack = "alie", share = 0.2, scale = 2.0 }', "takes no share, scale"),
        ('malicious = { attack = "label-flip", value = 2.0 }', "takes no value"),
        ('malicious = { attack = "ipm", sites = -1 }', "not allowed"),
        ('malicious = { attack = "ipm", sites = [] }', "not allowed"),
        ('malicious = { attack = "ipm", sites = 10 }', "leaves no honest one of 10"),
        ('malicious = { attack = "backdoor", feature = 900 }', "feature = 900: there are 27"),
        ("coordinator_crash = 6", r"after the last of \[study\] rounds = 5"),
        ("stragler = 3", "did you mean `stragglers`"),
        ('leave_out = ["nowhere"]', "names no site nowhere; sites: site-01,"),
        (f"leave_out = {[f'site-{n:02d}' for n in range(1, 11)]}", "leaves out every site"),
        ('runtime = "ray"\nengine = "vectorised"', "runtime ray trains site by site"),
        ('runtime = "loopback"\ncrash = 0.1', "nothing of a scenario happens"),
        ('sites = "*.toml"', "remove partition, args"),
    ],
)
def test_what_cannot_be_is_said_with_file_and_line_and_leaves_nothing(
    tmp_path: Path, line: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        run_with(tmp_path, f"{line}\n")

    assert str(raised.value).startswith(f"{tmp_path / 'study.toml'}:")
    assert raised.value.line is not None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("privacy", "attack", "says"),
    [
        (EPSILON_4, "alie", "secure = true hides"),
        (EPSILON_4, "min-max", "secure = true hides"),
        (DISTRIBUTED, "sign-flip", '"distributed" sends none'),
    ],
)
def test_an_attack_that_needs_what_nobody_sees_is_refused(
    tmp_path: Path, privacy: str, attack: str, says: str
) -> None:
    file = write_study(
        tmp_path, privacy=privacy, extra=f'[simulation]\nmalicious = {{ attack = "{attack}" }}\n'
    )
    file.write_text(file.read_text().replace("secure = false", "secure = true"))

    with pytest.raises(ConfigError, match=says):
        prepare_run(file, tmp_path / "run")


def test_an_engine_that_cannot_be_had_is_refused_before_anything_begins(tmp_path: Path) -> None:
    extra = '[simulation]\nengine = "vectorised"\n'
    file = write_study(tmp_path, privacy=DISTRIBUTED, extra=extra)
    change(file, ("secure = false", "secure = true"))

    with pytest.raises(ConfigError, match=r'study.toml:26: .* engine = "vectorised" .* its share'):
        simulate(file, prepare_run(file, tmp_path / "run"))

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["per-site", "vectorised"])
def test_a_sign_flipped_inside_a_secure_sum_is_that_of_a_plain_one(
    tmp_path: Path, engine: str
) -> None:
    lines = 'malicious = { attack = "sign-flip", sites = 2, scale = 3.0 }\n'
    runs = []
    for secure in ("false", "true"):
        extra = f'{TEN}engine = "{engine}"\n{lines}'
        file = write_study(tmp_path / secure, privacy=NO_PRIVACY, rounds=3, extra=extra)
        file.write_text(file.read_text().replace("secure = false", f"secure = {secure}"))
        runs.append(prepare_run(file, tmp_path / secure / "run"))
        simulate(file, runs[-1])
    plain, hidden = runs
    honest = run_with(tmp_path / "honest", f'engine = "{engine}"\n', privacy=NO_PRIVACY, rounds=3)

    np.testing.assert_allclose(model_of(hidden), model_of(plain), atol=2e-5, rtol=0)
    assert np.abs(model_of(plain) - model_of(honest)).max() > 1e-2
    assert len(rounds_of(plain, "attacked")) == 6
    assert rounds_of(hidden, "attacked") == rounds_of(plain, "attacked")


def test_a_round_that_too_few_answer_is_void_and_tried_again_on_every_runtime_alike(
    tmp_path: Path,
) -> None:
    lines = "dropout = { rate = 0.5 }\n"
    runs = []
    for number in (1, 2):
        file = write_study(tmp_path / str(number), rounds=5, extra=TEN + lines)
        file.write_text(file.read_text().replace("min_sites = 3", "min_sites = 6"))
        runs.append(prepare_run(file, tmp_path / str(number) / "run"))
        simulate(file, runs[-1])

    void = [event["round"] for event in runs[0].events() if event["event"] == "void"]
    rounds = [event for event in runs[0].events() if event["event"] == "round"]
    assert void
    assert [event["round"] for event in rounds] == [1, 2, 3, 4, 5]
    assert all(event["sites"] >= 6 for event in rounds)
    np.testing.assert_array_equal(model_of(runs[0]), model_of(runs[1]))
    assert "was void" in write_report(runs[0]).read_text()


def test_under_secure_aggregation_a_void_round_is_over_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    file = write_study(tmp_path, rounds=6, extra=f"{TEN}dropout = {{ rate = 0.3 }}\n")
    file.write_text(file.read_text().replace("secure = false", "secure = true"))
    run = prepare_run(file, tmp_path / "run")

    simulate(file, run)

    void = {event["round"] for event in run.events() if event["event"] == "void"}
    done = {event["round"] for event in run.events() if event["event"] == "round"}
    assert void
    assert void | done == {1, 2, 3, 4, 5, 6}
    assert not void & done


def test_a_study_that_asks_for_more_sites_than_ever_answer_ends(tmp_path: Path) -> None:
    file = write_study(tmp_path, rounds=2, extra=f"{TEN}dropout = {{ rate = 0.9 }}\n")
    file.write_text(file.read_text().replace("min_sites = 3", "min_sites = 9"))

    with pytest.raises(AggregationAborted, match="at least 9 sites are needed"):
        simulate(file, prepare_run(file, tmp_path / "run"))


def test_a_run_is_not_gone_on_with_as_another_simulation(tmp_path: Path) -> None:
    file = write_study(tmp_path, extra=TEN)
    prepare_run(file, tmp_path / "run")
    file.write_text(file.read_text() + "crash = 0.1\n")

    with pytest.raises(RunError, match="is a run of another study"):
        prepare_run(file, tmp_path / "run", resume=True)


def test_a_run_that_was_stopped_after_its_release_ends_with_its_exact_metrics(
    tmp_path: Path,
) -> None:
    run = run_with(tmp_path, "", rounds=2)
    whole = run.read_json("metrics.json")
    said = {name: value for name, value in whole.items() if name != "reported"}
    run.write_json("metrics.json", said | {"metrics": whole["reported"]})  # as the coordinator left

    again = prepare_run(tmp_path / "study.toml", run.path, resume=True)
    result = simulate(tmp_path / "study.toml", again)

    assert result == whole
    assert [event["event"] for event in run.events()].count("started") == 1
    with pytest.raises(RunError, match="has ended already"):
        prepare_run(tmp_path / "study.toml", run.path, resume=True)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "taken").touch()

    with pytest.raises(RunError, match="is not empty; choose another"):
        prepare_run(file, tmp_path / "mine")
    with pytest.raises(RunError, match=r"cannot be written: .*choose another"):
        prepare_run(file, tmp_path / "taken")
    with pytest.raises(RunError, match=r"cannot be written: .*choose another"):
        prepare_run(file, tmp_path / "taken" / "run")

    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_is_not_discarded(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", study_text="")
    run.event("started")

    run.discard()

    assert run.path.exists()
