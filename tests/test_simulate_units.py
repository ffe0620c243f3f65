"""Studies that protect records or patients, where patients have several records."""

import contextlib
import csv
import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import EPSILON_4, write_study

from fedward.cli import main
from fedward.client.admission import check_policy
from fedward.client.evaluation import counted_rows, evaluate_groups
from fedward.client.local_site import LocalSite
from fedward.client.plan import training_plan
from fedward.client.training import sampled_clipped_sum
from fedward.core.errors import AdmissionRefused, ConfigError
from fedward.core.identity import Identity
from fedward.core.run import RunDirectory
from fedward.core.site import load_site
from fedward.core.study import Study, load_study, parse_study
from fedward.privacy.accounting import dp_sgd_event, event_from_json
from fedward.privacy.ledger import Ledger
from fedward.privacy.mechanisms import simulated_source
from fedward.privacy.units import patient_guarantee
from fedward.server.statement import privacy_statement
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.registry import get_task
from fedward.tasks.subgroups import groupings
from fedward.transport.monitor import metrics_sensitivity

TASK = "visits_task:VISITS"
PUBLISHED = {2: 4.48, 5: 13.8, 10: 34.9}
SITE = """\
[site]
name = "{name}"
[data]
source = "csv"
path = "{name}.csv"
patient_id = "pid"
public_size = 120
[policy]
tasks = ["visits_task:VISITS"]
max_epsilon = 8.0
require_secure_aggregation = false
{policy}
"""
RECORD = EPSILON_4 + '\nunit = "record"'
PATIENT = EPSILON_4 + "\nmax_records = 2"


def write_visits(path: Path, *, patients: int = 60, seed: int = 1) -> None:
    """Made-up patients with one to four rows each."""
    rng = np.random.default_rng(seed)
    schema = get_task(TASK).schema
    fields = [*schema.features, schema.label]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pid", *(field.name for field in fields)])
        for patient in range(patients):
            for _ in range(rng.integers(1, 5)):
                cells: list[object] = [f"p{patient}"]
                for field in fields:
                    if field.kind == "category":
                        cells.append(field.categories[rng.integers(len(field.categories))])
                    elif field.kind == "flag":
                        cells.append(int(rng.integers(2)))
                    else:
                        assert field.scaling is not None
                        cells.append(f"{rng.uniform(*field.scaling):.2f}")
                writer.writerow(cells)


def consortium(folder: Path, *, privacy: str, policy: str = "", extra: str = "") -> Path:
    """A study of three hospitals with visits; its file."""
    (folder / "sites").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "c")):
        (folder / "sites" / f"{name}.toml").write_text(
            SITE.format(name=name, policy=policy).replace(
                f'name = "{name}"', f'name = "{name}"\nstate = "{name}"', 1
            )
        )
        write_visits(folder / "sites" / f"{name}.csv", seed=number)
    file = write_study(folder, privacy=privacy, rounds=4)
    text = file.read_text().replace('"heart-disease"', f'"{TASK}"', 1)
    file.write_text(text + extra + '\n[simulation]\nsites = "sites/*.toml"\n')
    return file


def shown(*arguments: str | Path) -> str:
    """What `fedward` prints."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = ["fedward", *map(str, arguments)]
    try:
        with contextlib.suppress(SystemExit), redirect_stdout(out):
            main()
    finally:
        sys.argv = argv
    return out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("records")
    file = consortium(folder, privacy=RECORD, policy="allow_record_unit = true")
    run = prepare_run(file, folder / "run")
    result = simulate(file, run)
    write_report(run)
    return run, result, folder


def test_a_study_of_records_says_what_it_means_for_patients(
    finished: tuple[RunDirectory, dict[str, Any], Path],
) -> None:
    run, result, _ = finished
    statement = json.loads((run.path / "release" / "privacy.json").read_text())

    for site in result["privacy"]["sites"].values():
        event = event_from_json(site["event"])
        assert site["unit"] == "record"
        assert [row["records"] for row in site["patients"]] == [2, 5, 10]
        for row in site["patients"]:
            exact = patient_guarantee(event, records=row["records"], delta=1e-5)
            assert row == {"records": row["records"], **exact.to_json()}
            assert row["epsilon"] > site["epsilon"]
        assert [row["records"] for row in site["held_out_patients"]["patients"]] == [2, 5, 10]
    assert statement["patients"][0]["epsilon"] == max(
        site["patients"][0]["epsilon"] for site in statement["sites"].values()
    )


def test_every_page_and_line_shows_it(
    finished: tuple[RunDirectory, dict[str, Any], Path],
) -> None:
    run, result, folder = finished
    from fedward.console import privacy_line

    wanted = [f"{row['epsilon']:.2f}" for row in result["privacy"]["patients"]]
    pages = {
        "report": (run.path / "report.html").read_text(),
        "card": (run.path / "release" / "card.html").read_text(),
        "closing line": privacy_line(result["privacy"]),
        "statement": result["privacy"]["statement"],
        "ledger": shown("ledger", "show", folder / "sites" / "a.toml"),
    }

    for name, page in pages.items():
        assert "per record" in page, name
        assert "per patient" in page, name
        assert "add-or-remove-one" in page, name
        assert "1e-05" in page, name
        assert "PLD" in page.upper(), name
        assert all(figure in page for figure in wanted), name


def test_the_ledger_shows_the_published_figures(tmp_path: Path) -> None:
    # 5,000 rows in batches of 64, 1,000 steps, noise 1, at delta 1e-4.
    (tmp_path / "site.toml").write_text(
        SITE.format(name="a", policy="allow_record_unit = true\ndelta = 1e-4")
    )
    identity = Identity.generate_site()
    identity.save(tmp_path / "state" / "identity.pem")
    path = tmp_path / "state" / "ledger.sqlite"
    event = dp_sgd_event(noise_multiplier=1.0, sample_rate=64 / 5000, steps=1000)
    with Ledger.open(path, identity=identity, site="a", simulated=False) as ledger:
        ledger.allot(study="records", event=event, max_epsilon=8.0, delta=1e-4, unit="record")
        ledger.settle(
            ledger.reserve(study="records", round_number=1, event=event), update_digest="ab" * 32
        )

    value = json.loads(shown("ledger", "show", tmp_path / "site.toml", "--json"))
    text = shown("ledger", "show", tmp_path / "site.toml")

    found = {row["records"]: row["epsilon"] for row in value["spent"]["patients"]}
    assert found == pytest.approx(PUBLISHED, rel=0.005)
    assert value["studies"][0]["patients"] == value["spent"]["patients"]
    assert value["spent"]["epsilon"] == pytest.approx(2.0, abs=0.005)
    assert "a record's total: epsilon" in text
    assert all(f"{found[records]:.2f}" in text for records in PUBLISHED)


def test_the_release_says_the_published_figures_in_one_line() -> None:
    event = dp_sgd_event(noise_multiplier=1.0, sample_rate=64 / 5000, steps=1000)
    table = [
        {"records": k, **patient_guarantee(event, records=k, delta=1e-4).to_json()}
        for k in PUBLISHED
    ]
    given = {"mode": "local", "simulated": False, "unit": "record", "delta": 1e-4}
    given |= {"neighboring_relation": "add-or-remove-one", "accountant": "pld"}
    given |= {"sites": {"a": {"epsilon": 2.0, "patients": table}}}

    line = privacy_statement(given)["statement"]

    assert (
        "per patient (add-or-remove-one, delta 0.0001, PLD): epsilon 4.48 with 2 records, "
        "epsilon 13.82 with 5 records, epsilon 34.88 with 10 records" in line
    )


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_a_figure_of_which_pld_is_the_larger_is_never_shown_without_saying_so(
    finished: tuple[RunDirectory, dict[str, Any], Path], tmp_path: Path, unit: str
) -> None:
    from fedward.console import privacy_line
    from fedward.core.canonical import canonical_json

    # A million steps with next to no sampling: rounding up each loss to the grid adds up.
    (tmp_path / "site.toml").write_text(SITE.format(name="a", policy=""))
    identity = Identity.generate_site()
    identity.save(tmp_path / "state" / "identity.pem")
    event = dp_sgd_event(noise_multiplier=50.0, sample_rate=0.001, steps=1_000_000)
    path = tmp_path / "state" / "ledger.sqlite"
    with Ledger.open(path, identity=identity, site="a", simulated=False) as ledger:
        ledger.allot(study="s", event=event, max_epsilon=8.0, delta=1e-5, unit="patient")
        ledger.reserve(study="s", round_number=1, event=event)
        spent = ledger.spent(1e-5).to_json()
    run, result, _ = finished
    privacy = {**result["privacy"], "unit": unit}
    privacy["sites"] = {"a": {**privacy["sites"]["a"], **spent}}
    other = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, other.path)
    metrics = {**run.read_json("metrics.json"), "privacy": privacy}
    (other.path / "metrics.json").write_bytes(canonical_json(metrics))
    write_report(other)

    pages = {
        "report": (other.path / "report.html").read_text(),
        "closing line": privacy_line(privacy),
        "statement": privacy_statement(privacy)["statement"],
        "ledger": shown("ledger", "show", tmp_path / "site.toml"),
    }

    for name, page in pages.items():
        assert "PLD is above RDP" in page, name


def test_a_site_that_does_not_say_what_it_means_leaves_no_figure() -> None:
    given = {"mode": "local", "simulated": False, "unit": "record", "delta": 1e-5}
    given |= {"neighboring_relation": "add-or-remove-one", "accountant": "pld"}
    given |= {"sites": {"a": {"epsilon": 2.0}}}

    assert "with several records is not known" in privacy_statement(given)["statement"]


def opened(folder: Path, *, privacy: str, extra: str = "") -> tuple[LocalSite, Study]:
    file = consortium(folder, privacy=privacy, policy="allow_record_unit = true", extra=extra)
    return LocalSite(folder / "sites" / "a.toml"), load_study(file)


def test_a_study_of_records_samples_and_clips_records(tmp_path: Path) -> None:
    site, study = opened(tmp_path, privacy=RECORD)
    task = get_task(TASK)

    training, _ = site.examples(task, study)

    assert training.num_units == len(training)
    patients, _ = site.tables(task, study)
    assert len(set(patients.patient_ids)) < len(training)


@pytest.mark.parametrize("privacy", [RECORD, PATIENT])
def test_one_unit_moves_the_clipped_sum_by_the_clip_norm_at_most(
    tmp_path: Path, privacy: str
) -> None:
    site, study = opened(tmp_path, privacy=privacy)
    task = get_task(TASK)
    training, _ = site.examples(task, study)
    from fedward.client.plan import plan_site

    plan = training_plan(study, plan_site(study, site.site), round_number=1)
    everybody = np.arange(len(training))

    def total(rows: np.ndarray) -> np.ndarray:
        # Whoever there is takes part: what a unit adds must not depend on who else is drawn.
        from dataclasses import replace

        model = task.model(study.model.name)
        whole = replace(plan, sample_rate=1.0, max_records=4)
        found, _ = sampled_clipped_sum(
            model, task.loss, training.take(rows), plan=whole, noise=simulated_source("x")
        )
        return np.asarray(found)

    full = total(everybody)
    moves = [
        np.linalg.norm(full - total(everybody[training.units != unit]))
        for unit in range(0, training.num_units, 7)
    ]
    assert max(moves) <= study.privacy.clip_norm * (1 + 1e-5)
    assert max(moves) > 0.5 * study.privacy.clip_norm


@pytest.mark.parametrize("privacy", [RECORD, PATIENT])
def test_one_unit_moves_the_metrics_by_what_noise_is_added_for(
    tmp_path: Path, privacy: str
) -> None:
    site, study = opened(
        tmp_path, privacy=privacy, extra="\n[evaluation]\nsubgroups = { sex = [], age = [50] }\n"
    )
    task = get_task(TASK)
    table, _ = site.tables(task, study)
    model = task.model(study.model.name)
    groups = groupings(task.schema, study.evaluation.subgroups)

    def counts(rows: list[int]) -> np.ndarray:
        part = table.take(rows)
        part = part.take(counted_rows(part.patient_ids, study))
        sums = evaluate_groups(task, model, part, groups, private=True)
        return np.concatenate([np.ravel(sums[name]) for name in sorted(sums)])

    rows = list(range(len(table.patient_ids)))
    if study.privacy.unit == "record":
        without = [[row for row in rows if row != gone] for gone in rows[:20]]
    else:
        people = sorted(set(table.patient_ids))[:20]
        without = [[row for row in rows if table.patient_ids[row] != gone] for gone in people]
    moves = [np.linalg.norm(counts(rows) - counts(rest)) for rest in without]

    assert max(moves) <= metrics_sensitivity(study) + 1e-9
    assert max(moves) > 0.5 * metrics_sensitivity(study)


def test_a_site_permits_studies_of_records_by_name_only(tmp_path: Path) -> None:
    study = load_study(consortium(tmp_path, privacy=RECORD))

    with pytest.raises(AdmissionRefused, match="allow_record_unit = false"):
        check_policy(load_site(tmp_path / "sites" / "a.toml"), study)


def test_records_of_embedded_hospitals_can_be_studied_and_are_stamped(tmp_path: Path) -> None:
    file = write_study(tmp_path, privacy=RECORD, rounds=2)

    result = simulate(file, prepare_run(file, tmp_path / "run"))

    assert result["privacy"]["unit"] == "record"
    assert len(result["privacy"]["patients"]) == 3
    assert not result["privacy"]["private"]


def test_a_bound_on_rows_a_patient_belongs_to_the_patient(tmp_path: Path) -> None:
    text = write_study(tmp_path, privacy=RECORD + "\nmax_records = 5").read_text()

    with pytest.raises(ConfigError, match="max_records = 5"):
        parse_study(text)
