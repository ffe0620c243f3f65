"""The same apps on Flower's Simulation Runtime, which spreads sites over a Ray cluster."""

import logging
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward.client.app import SIMULATED_SITES, make_app
from fedward.client.local_site import LocalSite
from fedward.core.errors import RunError
from fedward.core.run import RunDirectory
from fedward.core.site import load_site
from fedward.core.study import Study, load_study
from fedward.server.channel import FlowerChannel
from fedward.simulations.curve import Curve, with_curve
from fedward.simulations.faults import RetryingChannel, run_until_done
from fedward.simulations.provision import Provisioned
from fedward.simulations.scenarios import Scenario, make_scenario
from fedward.simulations.sites import SimulatedSite

_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def run_on_ray(
    sites: Provisioned,
    config: Mapping[str, str | int | float | bool],
    *,
    run: RunDirectory,
    study: Study,
    scenario: Scenario,
    curve: Curve,
) -> None:
    """Run both apps under Ray, on this machine or on the cluster that the study names.

    Sites keep their state in their folders, which on a cluster must be on a file system that all
    its machines share. What a process that failed was asked is asked again.

    Raises:
        RunError: Ray is not installed, or the run failed; says why.
    """
    try:
        import ray
    except ImportError as error:
        raise RunError("runtime ray needs Ray; install fedward[ray]") from error
    resources = study.simulation.resources
    cpus = int(resources.cpus) if resources.cpus.is_integer() else resources.cpus
    # Workers inherit the environment of the process that starts Ray.
    environment = _QUIET | {SIMULATED_SITES: str(sites.listing)}
    os.environ.update(environment)
    initial: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if resources.address is not None:
        initial = {"address": resources.address, "runtime_env": {"env_vars": environment}}
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.WARNING)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config.update(config)
        flower = RetryingChannel(FlowerChannel(grid), retries=resources.retries, log=run.event)
        run_until_done(with_curve(flower, study, curve), scenario, context, run)

    try:
        with warnings.catch_warnings():
            # The Python entry of Flower's Simulation Runtime is marked as deprecated in favour of
            # `flwr run`, which would need a SuperLink to be running.
            warnings.simplefilter("ignore")
            run_simulation(
                server_app,
                make_app(open_simulated),
                num_supernodes=len(sites.sites),
                backend_config={
                    "client_resources": {
                        "num_cpus": cpus,
                        "num_gpus": resources.gpus,
                    },
                    "init_args": initial,
                },
            )
    except RuntimeError as error:
        raise RunError(run.why_it_ended() or f"the run failed on Ray: {error}") from error
    finally:
        ray.shutdown()
        os.environ.pop(SIMULATED_SITES, None)
    reason = run.why_it_ended()
    if reason is not None:
        raise RunError(reason)


def open_simulated(context: Context) -> LocalSite:
    """The site of a Ray actor's node: one of the run's listing, by the node's number."""
    listing = Path(os.environ[SIMULATED_SITES])
    return _open(listing, int(context.node_config["partition-id"]))


@cache
def _open(listing: Path, number: int) -> LocalSite:
    return SimulatedSite(_files(listing)[number], _scenario(listing))


@cache
def _files(listing: Path) -> list[Path]:
    return [Path(line) for line in listing.read_text(encoding="utf-8").splitlines()]


@cache
def _scenario(listing: Path) -> Scenario:
    study = load_study(listing.parent / "study.toml")
    return make_scenario(study, sorted(load_site(file).name for file in _files(listing)))
