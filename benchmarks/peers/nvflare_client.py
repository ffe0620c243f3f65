"""A site of the job under NVFlare."""

import os

import job
import nvflare.client as flare
import torch
from nvflare_job import Net


def main() -> None:
    """Answer until the job is over."""
    torch.set_num_threads(1)
    flare.init()
    work = job.load(os.environ["JOB"])
    x, y = work.sites[int(flare.get_site_name().split("-")[-1]) - 1]
    net, loss_of = Net(), job.loss_of(work)
    while flare.is_running():
        message = flare.receive()
        if message is None:
            break
        net.load_state_dict(message.params)
        optimizer = torch.optim.SGD(net.parameters(), lr=work.learning_rate)
        for rows in work.batches(len(y)):
            optimizer.zero_grad()
            loss_of(net(x[rows]), y[rows]).backward()
            optimizer.step()
        params = {name: value.detach().clone() for name, value in net.state_dict().items()}
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": len(y)}))


if __name__ == "__main__":
    main()
