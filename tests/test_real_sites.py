"""Sites that are not simulated: their own CSV, secure noise, a durable ledger, a strict policy."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_simulate import model_of
from test_simulate_distributed import distributed_study

from fedward.client.local_site import LocalSite
from fedward.core.identity import Identity
from fedward.core.roster import write_roster
from fedward.core.run import RunDirectory
from fedward.serving.inbox import install_inbox
from fedward.serving.store import Store
from fedward.simulations.provision import PUBLISHER
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks import datasets
from fedward.tasks.registry import get_task

HOSPITALS = ("cleveland", "hungary", "va")
SITE = """\
[site]
name = "{name}"
[data]
source = "csv"
path = "patients.csv"
patient_id = "pid"
public_size = {size}
[data.columns]
age = "AGE_YRS"
cholesterol = {{ column = "CHOL_MMOL", factor = 38.67 }}
[policy]
tasks = ["heart-disease"]
max_epsilon = 6.0
min_sites = 3
require_secure_aggregation = true
roster = "../../roster.toml"
[serving]
publisher = "../../publisher.pub"
"""


def write_csv(path: Path, hospital: str) -> None:
    """An embedded hospital as it might export itself: other names, other units."""
    schema = get_task("heart-disease").schema
    table = datasets.load("heart-disease", partition=hospital)
    fields = [*schema.features, schema.label]
    names = {"age": "AGE_YRS", "cholesterol": "CHOL_MMOL"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pid", *(names.get(field.name, field.name) for field in fields)])
        for row, patient in enumerate(table.patient_ids):
            cells = []
            for field in fields:
                value = table.columns[field.name][row]
                if np.isnan(value):
                    cells.append("")
                elif field.categories:
                    cells.append(field.categories[int(value)])
                elif field.name == "cholesterol":
                    cells.append(f"{value / 38.67:.4f}")
                else:
                    cells.append(f"{value:g}")
            writer.writerow([patient, *cells])


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunDirectory, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("consortium")
    publisher = Identity.generate_publisher()
    (folder / "publisher.pub").write_bytes(publisher.public.pem())
    roster = {}
    for name in HOSPITALS:
        home = folder / "sites" / name
        home.mkdir(parents=True)
        size = datasets.partitions("heart-disease")[name]
        (home / "site.toml").write_text(SITE.format(name=name, size=size))
        write_csv(home / "patients.csv", name)
        roster[name] = LocalSite(home / "site.toml").identity.public
    write_roster(folder / "roster.toml", roster)
    file = distributed_study(folder, rounds=10)
    file.write_text(file.read_text() + '\n[simulation]\nsites = "sites/*/site.toml"\n')
    run = prepare_run(file, folder / "run")
    publisher.save(run.path / PUBLISHER)
    write_roster(run.path / "roster.toml", roster)
    return run, simulate(file, run), folder


def test_the_release_promises_privacy(finished: tuple[RunDirectory, dict[str, Any], Path]) -> None:
    run, result, _ = finished
    statement = json.loads((run.path / "release" / "privacy.json").read_text())

    assert statement["private"]
    assert statement["statement"].startswith("Differentially private: epsilon")
    assert set(result["privacy"]["sites"]) == set(HOSPITALS)
    assert all(3.9 < s["epsilon"] <= 4 for s in result["privacy"]["sites"].values())


def test_the_model_is_worth_something(
    finished: tuple[RunDirectory, dict[str, Any], Path],
) -> None:
    _, result, _ = finished

    assert result["metrics"]["pooled"]["auroc"] > 0.8


def test_noise_is_not_drawn_from_the_seed(
    finished: tuple[RunDirectory, dict[str, Any], Path], tmp_path: Path
) -> None:
    run, _, folder = finished
    file = distributed_study(tmp_path, rounds=10)
    text = file.read_text().replace('name = "heart"', 'name = "again"')
    file = folder / "again.toml"
    file.write_text(text + '\n[simulation]\nsites = "sites/*/site.toml"\n')
    again = prepare_run(file, folder / "again")
    for name in ("keys/publisher.pem", "roster.toml"):
        (again.path / name).parent.mkdir(exist_ok=True)
        (again.path / name).write_bytes((run.path / name).read_bytes())
        (again.path / name).chmod(0o600)

    result = simulate(file, again)

    assert not np.allclose(model_of(again), model_of(run), atol=1e-3)
    spent = LocalSite(folder / "sites" / "va" / "site.toml").ledger.spent(1e-5).epsilon
    assert 4.0 < spent <= 6.0  # two studies, jointly: less than the sum of 8
    assert result["privacy"]["private"]


def test_the_hospital_serves_what_it_verified(
    finished: tuple[RunDirectory, dict[str, Any], Path],
) -> None:
    _, _, folder = finished
    store = Store(folder / "sites" / "va" / "store")

    install_inbox(store)

    assert store.newest("heart").release.privacy["private"]


def test_keys_and_patients_stay_out_of_everything_that_was_written_for_others(
    finished: tuple[RunDirectory, dict[str, Any], Path],
) -> None:
    run, _, folder = finished
    patients = set(datasets.load("heart-disease", partition="va").patient_ids)
    private = (folder / "sites" / "va" / "state" / "identity.pem").read_text().splitlines()[1]
    written = "".join(
        path.read_text()
        for path in (run.path / "events.jsonl", run.path / "metrics.json", run.path / "report.html")
        if path.exists()
    )

    assert private not in written
    assert not any(f'"{patient}"' in written for patient in patients)
