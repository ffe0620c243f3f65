from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training import NotPrivate, Private, TrainingPlan, train
from fedward.client.training.plan import Mode
from fedward.client.training.weights import weighted
from fedward.privacy.mechanisms import simulated_source
from fedward.tasks.adapters import LowRank, add_adapters
from fedward.tasks.task import Examples


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


def plan_of(mode: Mode) -> TrainingPlan:
    return TrainingPlan(
        learning_rate=0.5,
        steps=3,
        sample_rate=0.5,
        expected_batch_size=20.0,
        guarantee=Private(clip_norm=0.5, noise_multiplier=1.0),
        mode=mode,
    )


def examples_of() -> Examples:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 6)).astype(np.float32)
    return Examples(features, rng.integers(0, 3, 40), np.arange(40))


def test_adapters_change_nothing_at_first_and_merge_exactly() -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(5, 4), torch.randn(7, 5)
    expected = layer(x)
    adapter = LowRank(layer, rank=2, scale=3.0, seed=0)

    torch.testing.assert_close(adapter(x), expected)
    with torch.no_grad():
        adapter.up.weight.normal_()
    assert not torch.allclose(adapter(x), expected)
    torch.testing.assert_close(adapter.merged()(x), adapter(x))


@pytest.mark.parametrize("mode", ["book-keeping", "hooks"])
def test_only_adapters_are_trained_clipped_and_noised(mode: Mode) -> None:
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, ["0", "2"], rank=2)

    result = train(
        model, cross_entropy, examples_of(), plan=plan_of(mode), noise=simulated_source(1)
    )

    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {"0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"}
    for name, p in model.named_parameters():
        if name not in moved:
            assert torch.equal(p, before[name.replace("layer.", "")])
    assert result.update.shape == (sum(p.numel() for p in model.parameters() if p.requires_grad),)
    assert result.update.all()


def test_modes_agree_on_adapters() -> None:
    updates = []
    for mode in ("book-keeping", "hooks", "ghost", "functorch"):
        model = model_of()
        add_adapters(model, ["0", "2"], rank=2)
        updates.append(
            train(
                model, cross_entropy, examples_of(), plan=plan_of(mode), noise=simulated_source(1)
            ).update
        )

    for update in updates[1:]:
        np.testing.assert_allclose(update, updates[0], atol=1e-6)


def test_what_is_no_linear_layer_takes_no_adapter() -> None:
    for name in ("1", "", "9"):
        with pytest.raises(ValueError, match="not a linear layer"):
            add_adapters(model_of(), [name], rank=2)
    with pytest.raises(ValueError, match="rank"):
        add_adapters(model_of(), ["0"], rank=0)


@pytest.mark.parametrize("mode", ["book-keeping", "hooks"])
def test_class_weights_stay_inside_the_bound(mode: Mode) -> None:
    from fedward.client.training.loop import sampled_clipped_sum

    loss = weighted(cross_entropy, [1.0, 10.0, 0.1])
    all_in = TrainingPlan(
        learning_rate=0.1,
        steps=1,
        sample_rate=1.0,
        expected_batch_size=1.0,
        guarantee=Private(clip_norm=0.5, noise_multiplier=1.0),
        mode=mode,
    )
    everybody = examples_of()
    for row in range(8):
        total, _ = sampled_clipped_sum(
            model_of(), loss, everybody.take([row]), plan=all_in, noise=simulated_source(0)
        )
        assert np.linalg.norm(total) <= 0.5 * (1 + 1e-6)


def test_class_weights_weigh() -> None:
    outputs, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])

    got = weighted(cross_entropy, [1.0, 2.0, 0.5])(outputs, labels)

    factors = torch.tensor([1.0, 2.0, 0.5, 1.0, 2.0, 0.5])
    torch.testing.assert_close(got, cross_entropy(outputs, labels) * factors)
    for bad in ([], [0.0, 1.0], [11.0], [float("nan")]):
        with pytest.raises(ValueError, match="class weights"):
            weighted(cross_entropy, bad)


def test_a_start_from_public_data_costs_nothing_and_helps() -> None:
    rng = np.random.default_rng(5)
    direction = rng.standard_normal(6)

    def drawn(rows: int) -> Examples:
        features = rng.standard_normal((rows, 6)).astype(np.float32)
        labels = ((np.abs(features @ direction)) > 1.5).astype(np.int64)
        return Examples(features, labels, np.arange(rows))

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def accuracy(model: nn.Module, examples: Examples) -> float:
        found = model(torch.from_numpy(np.asarray(examples.features))).argmax(1).numpy()
        return float(np.mean(found == examples.labels))

    public, patients, test = drawn(2000), drawn(300), drawn(2000)
    pretraining = TrainingPlan(
        learning_rate=0.3,
        momentum=0.9,
        steps=300,
        sample_rate=0.1,
        expected_batch_size=200,
        guarantee=NotPrivate(),
    )
    private = replace(
        pretraining,
        momentum=0.0,
        steps=30,
        expected_batch_size=30,
        guarantee=Private(clip_norm=0.5, noise_multiplier=3.0),
    )
    start = build()
    train(start, cross_entropy, public, plan=pretraining, noise=simulated_source(1))
    trunk = start[0].requires_grad_(False)
    before = next(trunk.parameters()).clone()
    scratch = build()

    warm = train(start, cross_entropy, patients, plan=private, noise=simulated_source(2))
    cold = train(scratch, cross_entropy, patients, plan=private, noise=simulated_source(2))

    assert warm.event == cold.event
    assert torch.equal(next(trunk.parameters()), before)
    assert accuracy(start, test) > accuracy(scratch, test) + 0.1
