"""`fedward demo`: the whole path on four real hospitals, in about a minute.

Trains alone, pooled (for comparison only), federated, and federated with differential privacy;
publishes the private model, serves it, and asks for one patient's risk.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedward.client.evaluation import evaluate_model
from fedward.client.local_site import LocalSite
from fedward.core.files import write_atomic
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study
from fedward.server.outcome import summarise_sites
from fedward.simulations.adapter import LocalAdapter
from fedward.simulations.baselines import train_centrally
from fedward.simulations.report import write_demo_report
from fedward.simulations.simulate import prepare_run, released_parameters, simulate
from fedward.strategies.strategy import Vector
from fedward.tasks import datasets
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Examples, Task

Show = Callable[[str, Mapping[str, Any]], None]

_STUDY = """\
[study]
name   = "{name}"
task   = "heart-disease"
rounds = 100
seed   = 7

[model]
name = "logistic"

[training]
local_steps   = 1
sample_rate   = 0.3
learning_rate = 1.0

[strategy]
name = "fedavg"
average_last = 0.5

[privacy]
{privacy}

[aggregation]
secure    = false
min_sites = {min_sites}
{monitor}
[simulation]
leave_out = [{leave_out}]
"""
_NO_PRIVACY = 'mode = "none"\nacknowledge = "no privacy"'
_PRIVATE = 'mode = "local"\nunit = "patient"\nepsilon = 4.0\ndelta = 1e-5\nclip_norm = 1.0'
# Histograms of the training patients, so that the adapter notices drift: part of epsilon 4. And
# figures by sex for the card.
_MONITOR = "\n[monitor]\nepsilon = 1.0\n\n[evaluation]\nsubgroups = { sex = [] }\n"
_WHAT = (
    "Four hospitals train one model of heart disease.\n"
    "Patients' records stay where they are; what leaves is clipped and noised."
)
_CAPTION = (
    "alone: a hospital's own model on its own patients. *pooling rows is what hospitals may\n"
    "not do: for comparison only. left out: AUC on all patients of a hospital that took no\n"
    "part, without privacy. ε spent: by each site's ledger, delta 1e-5, per patient."
)
_PATIENT = {
    "age": 58,
    "sex": "male",
    "chest_pain": "asymptomatic",
    "resting_blood_pressure": 140,
    "cholesterol": {"value": 6.2, "unit": "mmol/L"},
    "max_heart_rate": 118,
    "exercise_angina": True,
    "st_depression": 1.8,
}


@dataclass(frozen=True, slots=True)
class _Hospitals:
    task: Task
    names: tuple[str, ...]
    sites: Mapping[str, LocalSite]
    training: Mapping[str, Examples]
    held_out: Mapping[str, Examples]


def run_demo(out: Path | None, *, show: Show | None) -> dict[str, Any]:
    """Run the demo in a folder; `show` is told of each stage.

    Returns:
        The comparison, the private run's metrics, the adapter's answer and where the report is.
    """
    started = time.monotonic()
    tell: Show = show or (lambda _stage, _value: None)
    folder = out or _new_folder(Path("runs"))
    tell("hospitals", _describe())
    task = get_task("heart-disease")
    names = tuple(datasets.partitions("heart-disease"))
    total = 3 + len(names) + 1
    done = 0

    def step(what: str) -> None:
        nonlocal done
        tell("progress", {"what": what, "done": done, "total": total})
        done += 1

    step("federated, no privacy")
    federated, study = _run(folder, "federated", _NO_PRIVACY)
    hospitals = _open(task, study, federated, names)
    step("federated, epsilon 4")
    private, _ = _run(folder, "private", _PRIVATE)
    step("alone and pooled")
    parts = [hospitals.training[name] for name in names]
    sites = [hospitals.sites[name].site for name in names]
    pooled = train_centrally(task, study, sites, parts)
    alone = {
        name: train_centrally(task, study, [site], [part])
        for name, site, part in zip(names, sites, parts, strict=True)
    }
    left_out = {}
    for name in names:
        step(f"without {name}")
        run, without = _run(folder, f"without-{name}", _NO_PRIVACY, leave_out=name)
        left_out[name] = released_parameters(run, without)
    models = {
        "alone": alone,
        "pooled*": dict.fromkeys(names, pooled),
        "federated": dict.fromkeys(names, released_parameters(federated, study)),
        "ε = 4": dict.fromkeys(names, released_parameters(private, _study(private))),
    }
    comparison = _compare(hospitals, study, models, left_out, private)
    tell("comparison", comparison)
    metrics = private.read_json("metrics.json")
    release = Path(metrics["release"])
    monitor = release / "monitor.json"
    signature = json.loads((release / "signature.json").read_text(encoding="utf-8"))
    tell(
        "release",
        {
            "name": signature["model"],
            "version": signature["version"],
            "where": str(release),
            "privacy": metrics["privacy"],
            "drift": json.loads(monitor.read_bytes()) if monitor.exists() else None,
        },
    )
    write_demo_report(folder, private, comparison)
    with LocalAdapter(private.path / "stores" / names[0]) as adapter:
        answer = adapter.predict(_PATIENT)
        url = adapter.url
    asked = {name: _said(value) for name, value in _PATIENT.items()}
    tell("answer", {"url": url, "asked": asked, "answer": answer})
    seconds = round(time.monotonic() - started, 1)
    report = folder / "report.html"
    site_file = private.path / "sites" / f"{names[0]}.toml"
    tell("end", {"report": str(report), "site": str(site_file), "seconds": seconds})
    return {
        "folder": str(folder),
        "seconds": seconds,
        "comparison": comparison,
        "metrics": metrics,
        "answer": answer,
        "report": str(report),
    }


def _new_folder(root: Path) -> Path:
    from datetime import UTC, datetime

    return root / f"{datetime.now(UTC).strftime('%Y-%m-%dT%H-%M-%S')}-demo"


def _describe() -> dict[str, Any]:
    task = get_task("heart-disease")
    sites = []
    for name in datasets.partitions("heart-disease"):
        examples = task.prepare(datasets.load("heart-disease", partition=name), None)
        sites.append(
            {
                "name": name,
                "patients": len(examples.labels),
                "prevalence": float(np.mean(examples.labels)),
            }
        )
    return {"what": _WHAT, "sites": sites}


def _run(
    folder: Path, name: str, privacy: str, *, leave_out: str | None = None
) -> tuple[RunDirectory, Study]:
    file = folder / "studies" / f"{name}.toml"
    text = _STUDY.format(
        name="heart-disease" if name == "private" else f"heart-{name}",
        privacy=privacy,
        monitor=_MONITOR if privacy == _PRIVATE else "",
        min_sites=3,
        leave_out=f'"{leave_out}"' if leave_out else "",
    )
    write_atomic(file, text)
    run = prepare_run(file, folder / name)
    simulate(file, run)
    return run, _study(run)


def _study(run: RunDirectory) -> Study:
    return load_study(run.path / "study.toml")


def _open(task: Task, study: Study, run: RunDirectory, names: tuple[str, ...]) -> _Hospitals:
    sites = {name: LocalSite(run.path / "sites" / f"{name}.toml") for name in names}
    examples = {name: site.examples(task, study) for name, site in sites.items()}
    return _Hospitals(
        task,
        names,
        sites,
        {name: pair[0] for name, pair in examples.items()},
        {name: pair[1] for name, pair in examples.items()},
    )


def _compare(
    hospitals: _Hospitals,
    study: Study,
    models: Mapping[str, Mapping[str, Vector]],
    left_out: Mapping[str, Vector],
    private: RunDirectory,
) -> dict[str, Any]:
    task = hospitals.task
    model = study_model(study, task)
    results = {}
    for column, vectors in models.items():
        sums = {}
        for name in hospitals.names:
            from_vector(model, vectors[name])
            sums[name] = evaluate_model(task, model, hospitals.held_out[name])
        results[column] = summarise_sites(task, sums)
    unseen = {}
    for name, vector in left_out.items():
        from_vector(model, vector)
        whole = task.prepare(datasets.load("heart-disease", partition=name), None)
        unseen[name] = task.summarise(evaluate_model(task, model, whole))["auroc"]
    spent = private.read_json("metrics.json")["privacy"]["sites"]
    rows: list[dict[str, Any]] = []
    for name in hospitals.names:
        cells = [_pair(result["sites"][name]) for result in results.values()]
        cells += [_short(unseen[name]), f"{spent[name]['epsilon']:.2f}"]
        rows.append({"name": name, "cells": cells})
    rows.append({"name": "mean", "cells": [_pair(r["mean"]) for r in results.values()]})
    rows[-1]["cells"] += [_short(float(np.mean(list(unseen.values())))), ""]
    blank = "\u00a0" * 4  # No-break spaces: where the accuracy stands in the rows above.
    worst = [_short(result["worst"]["auroc"]) + blank for result in results.values()]
    rows.append({"name": "worst", "cells": [*worst, _short(min(unseen.values())), ""]})
    rows.append({"name": "all", "cells": [_pair(r["pooled"]) for r in results.values()]})
    rows[-1]["cells"] += ["", ""]
    return {
        "columns": [*models, "left out", "ε spent"],
        "rows": rows,
        "results": results,
        "left_out": unseen,
        "caption": _CAPTION,
    }


def _pair(values: Mapping[str, float]) -> str:
    if "auroc" not in values:
        return "–"
    return f"{_short(values['auroc'])} {_short(values['accuracy'], 2)}"


def _short(share: float, places: int = 3) -> str:
    # ".873": the table must fit in a terminal of 80 columns.
    return f"{share:.{places}f}".removeprefix("0")


def _said(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['value']} {value['unit']}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
