"""`fedward simulate`: one study, its sites and its coordinator on this machine."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fedward.client.app import make_app
from fedward.client.evaluation import evaluate_model
from fedward.core.errors import ConfigError, RunError
from fedward.core.run import RunDirectory, manifest
from fedward.core.study import Study, load_study
from fedward.core.toml import in_file
from fedward.server.channel import FlowerChannel
from fedward.server.checkpoint import Checkpoint, load_checkpoint
from fedward.server.outcome import Tally
from fedward.simulations.attacks import attack_success
from fedward.simulations.channel import CohortChannel, MemoryChannel
from fedward.simulations.curve import Curve, with_curve
from fedward.simulations.engines import refuse_engine
from fedward.simulations.faults import run_until_done
from fedward.simulations.grid import InProcessGrid
from fedward.simulations.provision import data_fingerprints, provision
from fedward.simulations.scenarios import Scenario, make_scenario
from fedward.simulations.sites import LocalSites, open_sites
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Sums, add_sums
from fedward.transport.payload import InMemory

_SHOWN_ALONE = 64

Config = Mapping[str, str | int | float | bool]


def prepare_run(study_file: Path, path: Path, *, resume: bool = False) -> RunDirectory:
    """Start a run directory, or open one again.

    Raises:
        ConfigError: The study is wrong; nothing was written.
        RunError: The run is there already, or not, or has ended, or is of another study; or its
            folder cannot be written.
    """
    study = load_study(study_file)
    text = study_file.read_text(encoding="utf-8")
    if not resume:
        return RunDirectory.create(path, study_text=text)
    run = RunDirectory.open(path)
    if load_study(run.path / "study.toml").model_dump() != study.model_dump():
        raise RunError(f"{path} is a run of another study; resume it with its own study.toml")
    if _result_of(run).get("reported") is not None:
        raise RunError(f"{path} has ended already; see its metrics.json and report.html")
    return run


def _result_of(run: RunDirectory) -> dict[str, Any]:
    """What there is of `metrics.json`; without `reported` the coordinator alone has ended."""
    return run.read_json("metrics.json") if (run.path / "metrics.json").exists() else {}


def simulate(
    study_file: Path, run: RunDirectory, *, runtime: str | None = None, durable: bool = False
) -> dict[str, Any]:
    """Run a study on this machine.

    Args:
        study_file: The study; relative paths in it are relative to it.
        run: A prepared run directory.
        runtime: "in-process", "ray" or "loopback"; by default what the study says.
        durable: Give each site a ledger file of its own, flushed as a real site's is; on other
            runtimes than in-process it is so anyway.

    Returns:
        What `metrics.json` holds. Its `metrics` are the researcher's exact view of the held-out
        patients; `reported` is what the sites told the coordinator, noised where the study is.

    Raises:
        ConfigError: The study asks for what cannot be had; the run's folder is gone again.
        FedwardError: The run failed; it can be resumed.
    """
    try:
        return _simulate(study_file, run, runtime=runtime, durable=durable)
    except ConfigError as error:
        run.discard()
        raise in_file(error, study_file) from error


def _simulate(
    study_file: Path, run: RunDirectory, *, runtime: str | None, durable: bool
) -> dict[str, Any]:
    study = load_study(run.path / "study.toml")
    chosen = runtime or study.simulation.runtime
    if chosen == "loopback" and (study.simulation.happens or study.simulation.evaluate_every):
        raise ConfigError(
            '= "loopback" starts a real coordinator and real sites, to which nothing of a scenario '
            'happens, and evaluate_every does not look; use "in-process" or "ray", or remove it',
            file="study",
            key="[simulation] runtime",
        )
    refuse_engine(study, runtime=chosen)
    in_files = durable or chosen != "in-process"
    sites = provision(run, study, study_file=study_file, durable=in_files)
    files = sites.load()
    made = manifest(study, data=data_fingerprints(files), runtime=chosen)
    # Whatever copies it, such as a release, says so too; sites of the study's own may be real.
    simulated = any(site.site.simulated for site in files.values())
    run.write_json("manifest.json", made | {"simulated": simulated})
    scenario = make_scenario(study, sorted(site.name for site in files.values()))
    if scenario.malicious:
        attack = study.simulation.malicious
        run.event("malicious", sites=sorted(scenario.malicious), attack=attack and attack.attack)
    config: Config = {
        "run": str(run.path.resolve()),
        "registry": str(sites.registry),
        "publisher": str(sites.publisher),
        "sites": len(sites.sites),
        "roster": str(sites.roster) if study.aggregation.secure else "",
        "durable": in_files,
    }
    with open_sites(run, files, scenario) as local:
        if scenario.has_trigger:
            _, held_out = next(iter(local.values())).examples(get_task(study.study.task), study)
            scenario.trigger(held_out)  # or raises, before anything begins
        curve = Curve(run, study, local.values())
        if _result_of(run):
            pass  # the coordinator ended, and was stopped before what follows
        elif chosen == "in-process":
            run_in_process(run, study, local, scenario, config=config, curve=curve)
        elif chosen == "ray":
            from fedward.simulations.ray import run_on_ray

            run_on_ray(sites, config, run=run, study=study, scenario=scenario, curve=curve)
        else:
            from fedward.simulations.loopback import run_on_loopback

            run_on_loopback(sites, config, run=run)
        return _with_exact_metrics(run, study, local, scenario, curve)


def run_in_process(
    run: RunDirectory,
    study: Study,
    sites: LocalSites,
    scenario: Scenario,
    *,
    config: Config,
    curve: Curve,
) -> None:
    """Run both apps in this process."""
    files = {str(file): file for file in sites}
    client_app = make_app(
        lambda context: sites[files[str(context.node_config["site"])]], pack=InMemory
    )
    grid = InProcessGrid(
        client_app,
        [{"site": file} for file in files],
        run_config=config,
        threads=study.simulation.threads,
    )
    nodes = dict(zip(grid.get_node_ids(), sites.values(), strict=True))
    cohort = CohortChannel(FlowerChannel(grid, pack=InMemory), nodes, study=study, log=run.event)
    kept = MemoryChannel(cohort, nodes, keep=sites.keep)
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(config))
    with closing(grid), _looking_at_what_is_new():
        run_until_done(with_curve(kept, study, curve), scenario, context, run)
    sites.keep()


@contextmanager
def _looking_at_what_is_new() -> Iterator[None]:
    """Keep the garbage collector from walking over all that was there before.

    Libraries and sites are hundreds of thousands of objects, none of them garbage, and looking
    through them all takes longer than a round of a thousand small sites.
    """
    already = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not already:
            gc.unfreeze()


def released_parameters(run: RunDirectory, study: Study) -> Any:
    """The model that a finished run published, as a flat float32 vector."""
    checkpoint = _checkpoint(run, study)
    return checkpoint.average.released(checkpoint.state.parameters)


def _checkpoint(run: RunDirectory, study: Study) -> Checkpoint:
    checkpoint = load_checkpoint(run.path / "checkpoints", study_hash=study.hash)
    if checkpoint is None:
        raise RunError(f"{run.path} has no checkpoint")
    return checkpoint


def _with_exact_metrics(
    run: RunDirectory, study: Study, sites: LocalSites, scenario: Scenario, curve: Curve
) -> dict[str, Any]:
    result = run.read_json("metrics.json")
    task = get_task(study.study.task)
    model = study_model(study, task)
    from_vector(model, released_parameters(run, study))
    tally, coarse = Tally(task), dict[str, Sums]()
    triggered: list[Sums] = []
    for site in sites.values():
        _, held_out = site.examples(task, study)
        sums = evaluate_model(task, model, held_out)
        tally.add(site.name, sums)
        # A picture of each of many sites shows nothing, and ten thousand do not fit in memory.
        name = site.name if len(sites) <= _SHOWN_ALONE else "all sites"
        part = task.private_metrics(sums)
        coarse[name] = add_sums([coarse[name], part]) if name in coarse else part
        if scenario.has_trigger and len(held_out):
            part = evaluate_model(task, model, scenario.trigger(held_out))
            triggered = [add_sums([*triggered, part])]
    run.write_json(
        "evaluation.json",
        {
            site: {name: np.asarray(a).tolist() for name, a in part.items()}
            for site, part in coarse.items()
        },
    )
    if study.simulation.evaluate_every is not None:
        last = _checkpoint(run, study).state.parameters
        result["curve"] = curve.points(last, rounds=study.study.rounds)
    result["reported"] = result["metrics"]
    result["metrics"] = tally.metrics()
    if triggered and tally.total is not None:
        result["metrics"]["backdoor"] = attack_success(triggered[0], tally.total)
    run.write_json("metrics.json", result)
    return result
