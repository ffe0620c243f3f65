"""The same apps on Flower's Simulation Runtime, which spreads sites over a Ray cluster."""

import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward.client.app import SIMULATED_SITES, make_app
from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError, RunError
from fedward.core.run import RunDirectory
from fedward.core.simulated import Resources
from fedward.core.site import load_site
from fedward.core.study import Study, load_study
from fedward.server.channel import FlowerChannel
from fedward.simulations.curve import Curve, with_curve
from fedward.simulations.faults import RetryingChannel, run_until_done
from fedward.simulations.provision import Provisioned
from fedward.simulations.scenarios import Scenario, make_scenario
from fedward.simulations.sites import SimulatedSite

_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
_ANSWERS_WITHIN = 5.0


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
        ConfigError: A site is to have more than Ray has.
        RunError: Ray is not installed or not there, or the run failed; says why.
    """
    resources = study.simulation.resources
    cpus = int(resources.cpus) if resources.cpus.is_integer() else resources.cpus
    try:
        ray = _start(resources, sites)
    except RunError:
        run.discard()  # whoever corrects an address can use the folder again
        raise
    from flwr.simulation import run_simulation

    # Whatever goes wrong is said in one line, below.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    server_app, ended = ServerApp(), threading.Event()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config.update(config)
        flower = RetryingChannel(
            FlowerChannel(grid, ended=ended.is_set), retries=resources.retries, log=run.event
        )
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
                },
            )
    except RuntimeError as error:
        raise RunError(run.why_it_ended() or f"the run failed on Ray: {_first(error)}") from error
    finally:
        ended.set()
        ray.shutdown()
    reason = run.why_it_ended()
    if reason is not None:
        raise RunError(reason)


def _start(resources: Resources, sites: Provisioned) -> Any:
    """Start Ray on this machine, or connect to the cluster that the study names; gives Ray.

    Flower would do it, and would have no place for the environment of a cluster's workers.
    """
    try:
        import ray
    except ImportError as error:
        raise RunError("runtime ray needs Ray; pip install 'fedward[ray]'") from error
    environment = {
        **_QUIET,
        SIMULATED_SITES: str(sites.listing),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    initial: dict[str, Any] = {"include_dashboard": False}
    if resources.address is not None:
        _knock(resources.address)
        initial = {"address": resources.address}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                **initial,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": environment},
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(why_not(resources.address, error)) from error
    there = ray.cluster_resources()
    for name, asked in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if asked > there.get(name, 0):
            ray.shutdown()
            raise ConfigError(
                f"= {asked:g} for a site, and Ray has {there.get(name, 0):g}; ask for less",
                file="study",
                key=f"[simulation.resources] {name.lower()}s",
            )
    return ray


def _knock(address: str) -> None:
    """See whether anybody listens: Ray itself would wait for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        return  # Ray looks for the cluster by itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, "
            "or remove [simulation.resources] address to use this machine"
        ) from error


def why_not(address: str | None, error: Exception) -> str:
    """Why Ray is not to be had, in one line."""
    # Of a traceback that Ray puts into its message, the last line says it.
    said = [line.strip() for line in _first(error).splitlines() if line.strip()]
    why = said[0] if len(said) == 1 else f"{said[0]} … {said[-1]}"
    if address in {None, "auto"}:
        return f"Ray does not start: {why}"
    return (
        f"Ray cannot be used at {address}: {why}; an address is host:port of a cluster's head, or "
        "ray://host:port of its Ray Client server, which is another port"
    )


def _first(error: BaseException) -> str:
    """What went wrong at first, of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


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
