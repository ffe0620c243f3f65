"""The job on Flower's own simulation, over Ray: the usual NumPyClient and FedAvg."""

import os
import sys
import warnings
from typing import Any

import job
import numpy as np
import torch

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
warnings.filterwarnings("ignore")

from flwr.client import NumPyClient  # noqa: E402 (after the environment)
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.server import ServerAppComponents, ServerConfig  # noqa: E402
from flwr.server.strategy import FedAvg  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402


def _arrays(model: torch.nn.Module) -> list[np.ndarray[Any, Any]]:
    return [value.numpy().copy() for value in model.state_dict().values()]


def _put(model: torch.nn.Module, arrays: list[np.ndarray[Any, Any]]) -> None:
    names = model.state_dict().keys()
    model.load_state_dict({n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)})


def main() -> None:
    """Run the job."""
    folder = sys.argv[1]
    work = job.load(folder)
    model, clock, last = job.make_model(work), job.Clock(), {}

    class Site(NumPyClient):
        def __init__(self, number: int) -> None:
            torch.set_num_threads(1)
            self.work = job.load(folder)
            self.x, self.y = self.work.sites[number]

        def fit(self, parameters: Any, config: Any) -> Any:  # noqa: ARG002 (Flower's names)
            net, loss_of = job.make_model(self.work), job.loss_of(self.work)
            _put(net, parameters)
            optimizer = torch.optim.SGD(net.parameters(), lr=self.work.learning_rate)
            for rows in self.work.batches(len(self.y)):
                optimizer.zero_grad()
                loss_of(net(self.x[rows]), self.y[rows]).backward()
                optimizer.step()
            return _arrays(net), len(self.y), {}

    class Timed(FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            done = super().aggregate_fit(server_round, results, failures)
            last["parameters"] = done[0]
            clock.lap()
            return done

    def server(_: Context) -> ServerAppComponents:
        strategy = Timed(
            fraction_evaluate=0.0,
            min_fit_clients=len(work.sites),
            min_available_clients=len(work.sites),
            initial_parameters=ndarrays_to_parameters(_arrays(model)),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=work.rounds))

    run_simulation(
        ServerApp(server_fn=server),
        ClientApp(client_fn=lambda c: Site(int(c.node_config["partition-id"])).to_client()),
        num_supernodes=len(work.sites),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    _put(model, parameters_to_ndarrays(last["parameters"]))
    clock.cpu = [float("nan")] * len(clock.wall)
    job.report(work, model, clock)


if __name__ == "__main__":
    main()
