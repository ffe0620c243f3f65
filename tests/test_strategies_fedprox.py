"""FedProx: the proximal term of Li et al. (MLSys 2020), against torch's own optimizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_simulate import model_of
from test_simulations_cohort import both, closeness, loss, make_examples, make_plan
from torch import nn

from fedward.client.training import NotPrivate, TrainingPlan, train
from fedward.core.errors import ConfigError
from fedward.privacy.mechanisms import simulated_source
from fedward.simulations.cohort import CohortSite
from fedward.simulations.simulate import prepare_run, simulate
from fedward.strategies.registry import make_strategy
from fedward.tasks.models import build


def moved(model: nn.Module, *, proximal: float, optimizer: str) -> NDArray[np.float32]:
    """Torch: the term is part of the loss, and autograd knows its gradient."""
    examples = make_examples(12, seed=3)
    start = [p.detach().clone() for p in model.parameters()]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    rule = kinds[optimizer](model.parameters(), lr=0.2)
    for _ in range(5):
        outputs = model(torch.from_numpy(examples.features))
        value = loss(outputs, torch.from_numpy(examples.labels)).mean()
        for p, origin in zip(model.parameters(), start, strict=True):
            value = value + proximal / 2 * (p - origin).square().sum()
        rule.zero_grad()
        torch.autograd.backward(value)
        rule.step()
    return np.concatenate(
        [(p.detach() - o).flatten() for p, o in zip(model.parameters(), start, strict=True)]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("proximal", [0.0, 1.5])
def test_a_site_trains_as_torch_does_with_the_term_in_its_loss(
    optimizer: str, proximal: float
) -> None:
    plan = TrainingPlan(
        optimizer="adam" if optimizer == "adam" else "sgd",
        learning_rate=0.2,
        steps=5,
        sample_rate=1.0,
        expected_batch_size=12.0,
        guarantee=NotPrivate(),
        proximal=proximal,
    )
    noise = simulated_source("fedprox")

    ours = train(
        build("mlp", num_features=6), loss, make_examples(12, seed=3), plan=plan, noise=noise
    )

    theirs = moved(build("mlp", num_features=6), proximal=proximal, optimizer=optimizer)
    np.testing.assert_allclose(ours.update, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("private", [None, 1.1])
def test_a_batch_of_sites_is_held_back_as_each_alone(private: float | None) -> None:
    model = build("mlp", num_features=6)
    free, held = (
        [
            CohortSite(make_examples(9 + n, seed=n), make_plan(n, private=private, proximal=mu))
            for n in range(6)
        ]
        for mu in (0.0, 2.0)
    )

    alone, together = both(model, held)

    assert closeness(alone, together) < 1e-5
    assert np.linalg.norm(alone - both(build("mlp", num_features=6), free)[0]) > 0.1


@pytest.mark.parametrize("privacy", [NO_PRIVACY, EPSILON_4], ids=["none", "local"])
def test_a_study_of_one_step_a_round_is_that_of_fedavg_and_one_of_more_is_not(
    tmp_path: Path, privacy: str
) -> None:
    models: dict[tuple[int, str], NDArray[np.float32]] = {}
    spent = set()
    for steps in (1, 4):
        for name in ("fedavg", 'fedprox"\nargs = { proximal = 3.0 }\n#"'):
            file = write_study(tmp_path / f"{steps}{name[:7]}", privacy=privacy, rounds=2)
            text = file.read_text().replace("local_steps = 1", f"local_steps = {steps}")
            file.write_text(text.replace("[strategy]", f'[strategy]\nname = "{name}"'))
            run = prepare_run(file, file.parent / "run")
            result = simulate(file, run)
            models[steps, name[:7]] = model_of(run)
            spent.add((steps, result["privacy"].get("epsilon")))

    np.testing.assert_array_equal(models[1, "fedprox"], models[1, "fedavg"])
    assert np.abs(models[4, "fedprox"] - models[4, "fedavg"]).max() > 1e-3
    assert len(spent) == 2  # the term is free


def test_a_term_that_pushes_away_is_refused() -> None:
    with pytest.raises(ConfigError, match="proximal must be 0 or more"):
        make_strategy("fedprox", {"proximal": -0.1})
