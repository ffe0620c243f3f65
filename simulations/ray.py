"""The same apps on Flower's Simulation Runtime, which spreads sites over a Ray cluster."""

import logging
import os
import warnings
from collections.abc import Mapping

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward.client.app import SIMULATED_SITES
from fedward.client.app import app as client_app
from fedward.core.errors import RunError
from fedward.core.run import RunDirectory
from fedward.server.app import main as server_main
from fedward.simulations.provision import Provisioned

_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def run_on_ray(
    sites: Provisioned, config: Mapping[str, str | int | float | bool], *, run: RunDirectory
) -> None:
    """Run both apps under Ray; each site takes one CPU.

    Raises:
        RunError: Ray is not installed, or the run failed; says why.
    """
    try:
        import ray
    except ImportError as error:
        raise RunError("runtime ray needs Ray; install fedward[ray]") from error
    # Workers inherit the environment of the process that starts Ray.
    os.environ.update(_QUIET | {SIMULATED_SITES: str(sites.listing)})
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.WARNING)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config.update(config)
        server_main(grid, context)

    try:
        with warnings.catch_warnings():
            # The Python entry of Flower's Simulation Runtime is marked as deprecated in favour of
            # `flwr run`, which would need a SuperLink to be running.
            warnings.simplefilter("ignore")
            run_simulation(
                server_app,
                client_app,
                num_supernodes=len(sites.sites),
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": {"include_dashboard": False, "log_to_driver": False},
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
