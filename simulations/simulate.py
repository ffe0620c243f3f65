"""`fedward simulate`: one study, its sites and its coordinator on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fedward.client.answers import evaluate_model
from fedward.client.app import app as client_app
from fedward.client.local_site import LocalSite
from fedward.core.errors import RunError
from fedward.core.run import RunDirectory, manifest
from fedward.core.study import Study, load_study
from fedward.server.app import app as server_app
from fedward.server.checkpoint import load_checkpoint
from fedward.server.outcome import summarise_sites
from fedward.simulations.grid import InProcessGrid
from fedward.simulations.provision import Provisioned, data_fingerprints, provision
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task

Config = Mapping[str, str | int | float | bool]


def prepare_run(study_file: Path, path: Path, *, resume: bool = False) -> RunDirectory:
    """Start a run directory, or open one again.

    Raises:
        ConfigError: The study is wrong; nothing was written.
        RunError: The run is there already, or not, or has ended, or is of another study.
    """
    study = load_study(study_file)
    text = study_file.read_text(encoding="utf-8")
    if not resume:
        return RunDirectory.create(path, study_text=text)
    run = RunDirectory.open(path)
    if load_study(run.path / "study.toml").hash != study.hash:
        raise RunError(f"{path} is a run of another study; resume it with its own study.toml")
    if (run.path / "metrics.json").exists():
        raise RunError(f"{path} has ended already; see its metrics.json")
    return run


def simulate(study_file: Path, run: RunDirectory, *, runtime: str | None = None) -> dict[str, Any]:
    """Run a study on this machine.

    Args:
        study_file: The study; relative paths in it are relative to it.
        run: A prepared run directory.
        runtime: "in-process", "ray" or "loopback"; by default what the study says.

    Returns:
        What `metrics.json` holds. Its `metrics` are the researcher's exact view of the held-out
        patients; `reported` is what the sites told the coordinator, noised where the study is.

    Raises:
        FedwardError: The run failed; it can be resumed.
    """
    study = load_study(run.path / "study.toml")
    chosen = runtime or study.simulation.runtime
    sites = provision(run, study, study_file=study_file)
    run.write_json(
        "manifest.json", manifest(study, data=data_fingerprints(sites.sites), runtime=chosen)
    )
    config: Config = {
        "run": str(run.path.resolve()),
        "registry": str(sites.registry),
        "publisher": str(sites.publisher),
        "sites": len(sites.sites),
        "roster": str(sites.roster) if study.aggregation.secure else "",
    }
    if chosen == "in-process":
        run_in_process(sites, config)
    elif chosen == "ray":
        from fedward.simulations.ray import run_on_ray

        run_on_ray(sites, config, run=run)
    else:
        from fedward.simulations.loopback import run_on_loopback

        run_on_loopback(sites, config, run=run)
    return _with_exact_metrics(run, study, sites)


def run_in_process(sites: Provisioned, config: Config) -> None:
    """Run both apps in this process."""
    grid = InProcessGrid(
        client_app, [{"site": str(file)} for file in sites.sites], run_config=config
    )
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(config))
    server_app(grid, context)


def released_parameters(run: RunDirectory, study: Study) -> Any:
    """The model that a finished run published, as a flat float32 vector."""
    checkpoint = load_checkpoint(run.path / "checkpoints", study_hash=study.hash)
    if checkpoint is None:
        raise RunError(f"{run.path} has no checkpoint")
    return checkpoint.average.released(checkpoint.state.parameters)


def _with_exact_metrics(run: RunDirectory, study: Study, sites: Provisioned) -> dict[str, Any]:
    result = run.read_json("metrics.json")
    task = get_task(study.study.task)
    model = task.model(study.model.name, **study.model.args)
    from_vector(model, released_parameters(run, study))
    sums = {}
    for file in sites.sites:
        site = LocalSite(file)
        _, held_out = site.examples(task, study)
        sums[site.site.name] = evaluate_model(task, model, held_out)
    coarse = {
        site: {name: np.asarray(a).tolist() for name, a in task.private_metrics(part).items()}
        for site, part in sums.items()
    }
    run.write_json("evaluation.json", coarse)
    result["reported"] = result["metrics"]
    result["metrics"] = summarise_sites(task, sums)
    run.write_json("metrics.json", result)
    return result
