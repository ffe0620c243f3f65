"""Whole runs in this process, on the four hospitals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from safetensors.numpy import load_file
from studies import EPSILON_4, NO_PRIVACY, change, write_study

from fedward.client.answers import train_round
from fedward.client.local_site import LocalSite
from fedward.core.errors import AdmissionRefused, AggregationAborted, RunError
from fedward.core.run import RunDirectory
from fedward.simulations.simulate import prepare_run, simulate

SITES = ("cleveland", "hungary", "switzerland", "va")


def run_study(folder: Path, **study: Any) -> tuple[RunDirectory, dict[str, Any]]:
    file = write_study(folder, **study)
    run = prepare_run(file, folder / "run")
    return run, simulate(file, run)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any]]:
    return run_study(tmp_path_factory.mktemp("private"), rounds=12)


def model_of(run: RunDirectory) -> np.ndarray[Any, Any]:
    weights = load_file(run.path / "release" / "model.safetensors")
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def test_epsilon_is_the_same_in_the_release_the_ledger_and_by_dp_accounting(
    private: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, result = private
    statement = json.loads((run.path / "release" / "privacy.json").read_text())

    for site in SITES:
        said = statement["sites"][site]
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        step = dp_accounting.PoissonSampledDpEvent(
            said["sample_rate"], dp_accounting.GaussianDpEvent(said["noise_multiplier"])
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, 12))
        oracle = accountant.get_epsilon(1e-5)
        ledger = LocalSite(run.path / "sites" / f"{site}.toml").ledger

        assert said["epsilon"] == pytest.approx(oracle, abs=1e-3)
        assert ledger.spent(1e-5).epsilon == pytest.approx(oracle, abs=1e-3)
        assert result["privacy"]["sites"][site]["epsilon"] == said["epsilon"]
        assert 3.9 < oracle <= 4.0


def test_the_ledgers_of_a_run_verify(private: tuple[RunDirectory, dict[str, Any]]) -> None:
    run, _ = private

    for site in SITES:
        LocalSite(run.path / "sites" / f"{site}.toml").ledger.verify()


def test_a_simulated_run_says_that_it_is_not_private(
    private: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, result = private

    assert not result["privacy"]["private"]
    assert "seed" in result["privacy"]["reason"]
    assert not json.loads((run.path / "release" / "privacy.json").read_text())["private"]


def test_every_site_took_the_release(private: tuple[RunDirectory, dict[str, Any]]) -> None:
    run, _ = private

    accepted = [e["site"] for e in run.events() if e["event"] == "release accepted"]

    assert accepted == list(SITES)
    for site in SITES:
        assert list((run.path / "stores" / site / "inbox").iterdir())


def test_reported_metrics_carry_noise_and_the_researchers_do_not(
    private: tuple[RunDirectory, dict[str, Any]],
) -> None:
    _, result = private

    exact = [result["metrics"]["sites"][site]["num_examples"] for site in SITES]
    reported = [result["reported"]["sites"][site]["num_examples"] for site in SITES]

    assert all(number == round(number) for number in exact)
    assert all(number != round(number) for number in reported)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    first, _ = run_study(tmp_path / "a", rounds=3)
    again, _ = run_study(tmp_path / "b", rounds=3)
    other, _ = run_study(tmp_path / "c", rounds=3, seed=8)

    np.testing.assert_array_equal(model_of(first), model_of(again))
    assert not np.array_equal(model_of(first), model_of(other))


def test_federated_quality_is_that_of_pooled_rows(tmp_path: Path) -> None:
    _, result = run_study(tmp_path, privacy=NO_PRIVACY, rounds=40)

    assert result["metrics"]["pooled"]["auroc"] > 0.85
    assert result["metrics"]["pooled"]["num_examples"] > 200


_KILLED = """
import os, signal, sys
from pathlib import Path
import fedward.server.rounds as rounds
from fedward.simulations.simulate import prepare_run, simulate
study, folder, last, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
save = rounds.save_checkpoint
def save_or_die(path, checkpoint, **options):
    if checkpoint.round_number == last and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, checkpoint, **options)
    if checkpoint.round_number == last:
        os.kill(os.getpid(), signal.SIGKILL)
rounds.save_checkpoint = save_or_die
simulate(study, prepare_run(study, folder))
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_run_resumes_to_the_same_model_and_spends_nothing_twice(
    tmp_path: Path, moment: str
) -> None:
    whole, unbroken = run_study(tmp_path / "whole", rounds=6)
    file = write_study(tmp_path / "broken", rounds=6)
    command = [sys.executable, "-c", _KILLED, str(file), str(tmp_path / "broken" / "run")]
    killed = subprocess.run(
        [*command, "4", moment], check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )

    run = prepare_run(file, tmp_path / "broken" / "run", resume=True)
    resumed = simulate(file, run)

    assert killed.returncode == -signal.SIGKILL
    np.testing.assert_array_equal(model_of(run), model_of(whole))
    for site in SITES:
        assert resumed["privacy"]["sites"][site]["epsilon"] == pytest.approx(
            unbroken["privacy"]["sites"][site]["epsilon"]
        )


def test_a_finished_run_is_not_resumed_and_a_new_one_takes_an_empty_folder(
    private: tuple[RunDirectory, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = private
    study = write_study(tmp_path, rounds=12)

    with pytest.raises(RunError, match="ended already"):
        prepare_run(study, run.path, resume=True)
    with pytest.raises(RunError, match="holds a run already"):
        prepare_run(study, run.path)
    with pytest.raises(RunError, match="another study"):
        prepare_run(write_study(tmp_path, rounds=13), run.path, resume=True)
    with pytest.raises(RunError, match="not a run directory"):
        prepare_run(study, tmp_path / "nowhere", resume=True)


def _with_policy(folder: Path, change: tuple[str, str]) -> tuple[Path, RunDirectory]:
    """A prepared run whose site `va` has another policy."""
    from fedward.core.study import load_study
    from fedward.simulations.provision import provision

    file = write_study(folder, privacy=EPSILON_4, rounds=2)
    run = prepare_run(file, folder / "run")
    provision(run, load_study(file), study_file=file)
    site = run.path / "sites" / "va.toml"
    text = site.read_text()
    assert change[0] in text
    site.write_text(text.replace(*change))
    return file, run


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("max_epsilon = 8.0", "max_epsilon = 2.0"), "limit 2.000"),
        (('tasks = ["heart-disease"]', 'tasks = ["other"]'), "[policy] tasks"),
        (("min_sites = 1", "min_sites = 4"), "[policy] min_sites = 4"),
        (
            ("require_secure_aggregation = false", "require_secure_aggregation = true"),
            "[policy] require_secure_aggregation",
        ),
        (("delta = 1e-05", "delta = 1e-06"), "[policy] delta"),
    ],
)
def test_a_site_refuses_by_its_own_policy_and_the_others_go_on(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    file, run = _with_policy(tmp_path, change)

    result = simulate(file, run)

    refusals = [event["reason"] for event in run.events() if event["event"] == "refused"]
    assert len(refusals) == 1
    assert says in refusals[0]
    assert set(result["privacy"]["sites"]) == {"cleveland", "hungary", "switzerland"}


def test_a_model_that_mixes_patients_is_refused_before_it_costs_anything(tmp_path: Path) -> None:
    file = write_study(tmp_path, rounds=2, extra='[simulation]\ndataset = "heart-disease"\n')
    change(file, ('task = "heart-disease"', 'task = "odd_tasks:NORMALISED"'))
    run = prepare_run(file, tmp_path / "run")

    with pytest.raises(AggregationAborted, match=r"round 0 .*\[model\] name .* BatchNorm"):
        simulate(file, run)

    ledger = LocalSite(run.path / "sites" / "va.toml").ledger
    assert [entry.kind for entry in ledger.entries()] == ["genesis"]


def test_parameters_changed_between_rounds_find_no_door(
    private: tuple[RunDirectory, dict[str, Any]],
) -> None:
    from fedward.transport.payload import Payload

    run, _ = private
    site = LocalSite(run.path / "sites" / "va.toml")
    before = site.ledger.head

    for study_hash in ("0" * 64, "../../etc/passwd", ""):
        with pytest.raises(AdmissionRefused, match="not admitted"):
            train_round(site, Payload({"hash": study_hash, "round": 1}))

    assert site.ledger.head == before


def test_too_few_hospitals_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(AggregationAborted, match="round 0 is void"):
        run_study(tmp_path, extra='[simulation]\nleave_out = ["va", "hungary"]\n')
