"""One model trained for many sites, against a model of its own for each."""

import numpy as np
import pytest
import torch
from torch import nn

from fedward.client.training import NotPrivate, Private, TrainingPlan, train
from fedward.client.training.trainer import Trainer
from fedward.privacy.mechanisms import simulated_source
from fedward.privacy.mechanisms.noise import NoiseSource
from fedward.tasks.models import build
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.task import Examples

FEATURES = 5
ROWS = (7, 1, 0, 12, 9)  # a site without patients is a site


def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(
        outputs.reshape(-1), labels, reduction="none"
    )


def make_examples(rows: int, *, records: int) -> Examples:
    rng = np.random.default_rng(rows)
    units = rng.integers(0, max(1, rows // records), rows) if records > 1 else np.arange(rows)
    return Examples(
        rng.normal(size=(rows, FEATURES)).astype(np.float32),
        (rng.random(rows) < 0.5).astype(np.float32),
        np.unique(units, return_inverse=True)[1].astype(np.int64),
    )


def make_model(name: str) -> nn.Module:
    if name == "frozen":
        torch.manual_seed(3)  # what is frozen does not travel: everybody has the same
        model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))
        model[0].requires_grad_(requires_grad=False)
        return model
    return build(name, num_features=FEATURES)


def make_plan(guarantee: Private | NotPrivate, *, rate: float, steps: int) -> TrainingPlan:
    return TrainingPlan(
        learning_rate=0.4,
        momentum=0.5,
        steps=steps,
        sample_rate=rate,
        expected_batch_size=4.0,
        guarantee=guarantee,
        max_records=3,
    )


@pytest.mark.parametrize("name", ["logistic", "mlp", "frozen"])
@pytest.mark.parametrize(
    "guarantee", [NotPrivate(), Private(clip_norm=0.8, noise_multiplier=1.3)], ids=str
)
@pytest.mark.parametrize("records", [1, 3])
def test_sites_that_share_a_trainer_get_the_bits_of_a_model_of_their_own(
    name: str, guarantee: Private | NotPrivate, records: int
) -> None:
    model = make_model(name)
    start = to_vector(model)
    trainer = Trainer(make_model(name), loss)
    for round_number in (1, 2):
        for number, rows in enumerate(ROWS):
            rate = (1.0, 0.6)[number % 2]
            plan = make_plan(guarantee, rate=rate, steps=1 + number % 3)
            examples = make_examples(rows, records=records)

            def noise(number: int = number, round_number: int = round_number) -> NoiseSource:
                return simulated_source("trainer", number, round_number)

            from_vector(model, start)
            alone = train(model, loss, examples, plan=plan, noise=noise())
            sampler = trainer.sampler(examples, plan)
            shared = trainer.train(start, sampler, plan, noise=noise)

            assert shared.update.tobytes() == alone.update.tobytes()
            assert (shared.steps, shared.event) == (alone.steps, alone.event)
            start = start + alone.update


def test_no_source_is_made_where_its_draws_would_decide_nothing() -> None:
    def refuse() -> NoiseSource:
        raise AssertionError("nothing is to be drawn")

    plan = make_plan(NotPrivate(), rate=1.0, steps=2)
    trainer = Trainer(build("logistic", num_features=FEATURES), loss)
    sampler = trainer.sampler(make_examples(9, records=1), plan)
    start = np.zeros(FEATURES + 1, np.float32)
    assert np.abs(trainer.train(start, sampler, plan, noise=refuse).update).max() > 0


def test_an_update_stays_what_it_was_when_the_next_site_trains() -> None:
    plan = make_plan(NotPrivate(), rate=1.0, steps=1)
    trainer = Trainer(build("mlp", num_features=FEATURES), loss)
    start = to_vector(build("mlp", num_features=FEATURES))
    updates = []
    for rows in (5, 8):
        sampler = trainer.sampler(make_examples(rows, records=1), plan)
        update = trainer.train(start, sampler, plan, noise=lambda: simulated_source(1)).update
        updates.append((update, update.copy()))
    for update, copy in updates:
        np.testing.assert_array_equal(update, copy)
