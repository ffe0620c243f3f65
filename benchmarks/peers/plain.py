"""The reference: federated averaging as a plain torch loop, nothing else."""

import copy
import sys

import job
import torch


def main() -> None:
    """Run the job; with a noise multiplier, nothing changes: it is the non-private reference."""
    torch.set_num_threads(1)
    work = job.load(sys.argv[1])
    model = job.make_model(work)
    loss_of = job.loss_of(work)
    clock = job.Clock()
    for _ in range(work.rounds):
        start = copy.deepcopy(model.state_dict())
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        count = 0
        for x, y in work.sites:
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=work.learning_rate)
            for rows in work.batches(len(y)):
                optimizer.zero_grad()
                loss_of(model(x[rows]), y[rows]).backward()
                optimizer.step()
            for name, value in model.state_dict().items():
                total[name] += value * len(y)
            count += len(y)
        model.load_state_dict({name: value / count for name, value in total.items()})
        clock.lap()
    job.report(work, model, clock)


if __name__ == "__main__":
    main()
