"""The job on NVFlare's simulator: one thread a site, as it recommends."""

import os
import sys
import tempfile
from pathlib import Path

import job
import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv


class Net(torch.nn.Module):
    """The job's model under a name that NVFlare can find."""

    def __init__(self) -> None:
        super().__init__()
        self.net = job.make_model(job.load(os.environ["JOB"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs."""
        return self.net(x)


def main() -> None:
    """Run the job."""
    torch.set_num_threads(1)
    os.environ["JOB"] = sys.argv[1]
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = here + os.pathsep + os.environ.get("PYTHONPATH", "")
    work = job.load(sys.argv[1])
    count = len(work.sites)
    clock = job.Clock()
    with tempfile.TemporaryDirectory(prefix="nvflare-") as folder:
        recipe = FedAvgRecipe(
            name="job",
            model=Net(),
            min_clients=count,
            num_rounds=work.rounds,
            train_script=str(Path(here) / "nvflare_client.py"),
        )
        environment = SimEnv(num_clients=count, num_threads=count, workspace_root=folder)
        recipe.execute(environment).get_result()
        clock.lap()
        found = sorted(Path(folder).rglob("FL_global_model.pt"))
        net = Net()
        if found:
            state = torch.load(found[-1], weights_only=False)
            net.load_state_dict(state.get("model", state))
    whole = clock.wall[0] / work.rounds
    clock.wall, clock.cpu = [whole] * work.rounds, [float("nan")] * work.rounds
    job.report(work, net.net, clock, trained=bool(found))


if __name__ == "__main__":
    main()
