"""The job on pfl-research (Apple), with its Gaussian mechanism where the job is private."""

import itertools
import sys
from typing import Any

import job
import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import get_default_device
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism


class Net(torch.nn.Module):
    """The job's model, as pfl wants it."""

    def __init__(self, work: job.Job) -> None:
        super().__init__()
        self.net, self.loss_of = job.make_model(work), job.loss_of(work)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs."""
        return self.net(x)

    def loss(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> torch.Tensor:  # noqa: A002, ARG002 (pfl's names)
        """Mean loss of a batch."""
        return self.loss_of(self(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> dict[str, Any]:  # noqa: A002, ARG002 (pfl's names)
        """None: evaluation is the benchmark's."""
        return {}


class Laps(TrainingProcessCallback):
    """Times rounds."""

    def __init__(self) -> None:
        self.clock = job.Clock()

    def on_train_begin(self, *, model: Any) -> Metrics:  # noqa: ARG002 (pfl's names)
        """Start the clock."""
        self.clock = job.Clock()
        return Metrics()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        """A round is over."""
        self.clock.lap()
        return False, Metrics()

    def on_train_end(self, *, model: Any) -> None:
        """Nothing."""


def main() -> None:
    """Run the job."""
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 (pfl draws from the global generator)
    work = job.load(sys.argv[1])
    private = len(sys.argv) > 2 and sys.argv[2] == "private"
    device = get_default_device()
    net, laps = Net(work).to(device), Laps()
    sites = [(x.to(device), y.to(device)) for x, y in work.sites]
    users = itertools.cycle(range(len(sites)))
    data = FederatedDataset(
        lambda user: Dataset(raw_data=sites[user], user_id=str(user)), lambda: next(users)
    )
    processors: list[Any] = [WeightByDatapoints()]
    if private:
        processors.append(GaussianMechanism(work.clip_norm, work.noise_multiplier))
    FederatedAveraging().run(
        NNAlgorithmParams(work.rounds, 10**9, len(work.sites), None),
        SimulatedBackend(training_data=data, val_data=data, postprocessors=processors),
        PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0)),
        NNTrainHyperParams(
            local_batch_size=work.batch, local_num_epochs=1, local_learning_rate=work.learning_rate
        ),
        NNEvalHyperParams(None),
        [laps],
        send_metrics_to_platform=False,
    )
    job.report(work, net.net.cpu(), laps.clock)


if __name__ == "__main__":
    main()
