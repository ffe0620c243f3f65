"""Sites trained by Opacus one by one: the reference for private training."""

import copy
import sys
import warnings

import job
import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Run the job. Each site's engine is made once, which is kind to the reference."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    work = job.load(sys.argv[1])
    model = job.make_model(work)
    loss_of = job.loss_of(work)
    made = []
    for x, y in work.sites:
        local = job.make_model(work)
        optimizer = torch.optim.SGD(local.parameters(), lr=work.learning_rate)
        loader = DataLoader(TensorDataset(x, y), batch_size=min(work.batch, len(y)))
        made.append(
            PrivacyEngine(accountant="rdp").make_private(
                module=local,
                optimizer=optimizer,
                data_loader=loader,
                noise_multiplier=work.noise_multiplier,
                max_grad_norm=work.clip_norm,
                poisson_sampling=work.batch < len(y),
            )
        )
    clock = job.Clock()
    for _ in range(work.rounds):
        start = copy.deepcopy(model.state_dict())
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        count = 0
        for (_, y), (local, optimizer, loader) in zip(work.sites, made, strict=True):
            local._module.load_state_dict(start)  # noqa: SLF001 (Opacus has no other name)
            for features, labels in loader:
                optimizer.zero_grad()
                loss_of(local(features), labels).backward()
                optimizer.step()
            for name, value in local._module.state_dict().items():  # noqa: SLF001
                total[name] += value * len(y)
            count += len(y)
        model.load_state_dict({name: value / count for name, value in total.items()})
        clock.lap()
    job.report(work, model, clock)


if __name__ == "__main__":
    main()
