from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training import (
    Adaptive,
    NotPrivate,
    Private,
    TrainingPlan,
    TrainingState,
    train,
)
from fedward.client.training.loop import sampled_clipped_sum
from fedward.client.training.opacus_modes import SourcedOptimizer
from fedward.client.training.optimizers import FlatOptimizer
from fedward.client.training.plan import MODES, Mode, Optimizer
from fedward.tasks.task import Examples

OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "adamw")


@dataclass
class ScriptedSource:
    """Says who is sampled, and adds a known "noise"."""

    uniforms: Callable[[int], NDArray[np.float64]]
    noise: float = 0.0
    private: bool = False

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float32]:
        return np.full(size, self.noise * std, dtype=np.float32)

    def uniform(self, size: int) -> NDArray[np.float64]:
        return self.uniforms(size)


class SeededSource:
    private = False

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float32]:
        return self._rng.standard_normal(size, dtype=np.float32) * np.float32(std)

    def uniform(self, size: int) -> NDArray[np.float64]:
        return self._rng.random(size)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(6, 3)


def perceptron() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def examples_of(*, rows: int = 40, patients: int | None = None, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    units = np.arange(rows) if patients is None else rng.integers(0, patients, rows)
    return Examples(
        features=rng.standard_normal((rows, 6)).astype(np.float32),
        labels=rng.integers(0, 3, rows),
        units=units.astype(np.int64),
    )


def plan_of(**changes: Any) -> TrainingPlan:
    values: dict[str, Any] = {
        "learning_rate": 0.1,
        "steps": 3,
        "sample_rate": 0.5,
        "expected_batch_size": 20.0,
        "guarantee": Private(clip_norm=0.5, noise_multiplier=1.0),
    }
    return TrainingPlan(**(values | changes))


def fitting(build: Callable[[], nn.Module], records: int) -> list[Mode]:
    modes = [m for m in MODES if m != "closed-form" or build is linear]
    return [m for m in modes if m != "ghost" or records == 1]


@pytest.mark.parametrize("records", [1, 2, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", [linear, perceptron])
def test_every_mode_takes_the_same_steps(
    build: Callable[[], nn.Module], optimizer: Optimizer, records: int
) -> None:
    examples = examples_of(patients=15 if records > 1 else None)
    plan = plan_of(optimizer=optimizer, weight_decay=0.01, max_records=records, schedule="cosine")
    updates = [
        train(
            build(), cross_entropy, examples, plan=_with_mode(plan, mode), noise=SeededSource(5)
        ).update
        for mode in fitting(build, records)
    ]

    assert np.abs(updates[0]).max() > 1e-3
    for update in updates[1:]:
        np.testing.assert_allclose(update, updates[0], atol=1e-6)


def _with_mode(plan: TrainingPlan, mode: Mode) -> TrainingPlan:
    return replace(plan, mode=mode)


@pytest.mark.parametrize("mode", fitting(linear, 1))
def test_a_step_that_no_patient_is_in_releases_noise(mode: Mode) -> None:
    nobody = ScriptedSource(np.ones, noise=2.0)

    result = train(
        linear(),
        cross_entropy,
        examples_of(),
        plan=plan_of(steps=1, mode=mode),
        noise=nobody,
    )

    # learning rate 0.1, noise 2 * sigma 1 * clip 0.5, over the public batch size 20
    np.testing.assert_allclose(result.update, -0.1 * 2.0 * 0.5 / 20, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("mode", fitting(perceptron, 1))
def test_a_record_that_is_not_finite_counts_as_zero(mode: Mode, value: float) -> None:
    clean = examples_of(rows=20)
    broken = Examples(clean.features.copy(), clean.labels, clean.units)
    broken.features[7] = value
    plan = plan_of(mode=mode, sample_rate=1.0, steps=2)
    source = SeededSource(1)

    got = train(perceptron(), cross_entropy, broken, plan=plan, noise=source)

    without = clean.take([row for row in range(20) if row != 7])
    reference = SeededSource(1)
    reference_uniform = reference.uniform
    reference.uniform = lambda size: reference_uniform(size + 1)[:size]  # type: ignore[method-assign]
    expected = train(perceptron(), cross_entropy, without, plan=plan, noise=reference)
    np.testing.assert_allclose(got.update, expected.update, atol=1e-6)
    # A saturated loss has a gradient of zero, so 1e38 need not be counted; it must not matter.
    assert got.sanitised == 2 or value == 1e38


@pytest.mark.parametrize("mode", fitting(perceptron, 2))
def test_of_a_patient_only_the_broken_record_is_left_out(mode: Mode) -> None:
    units = np.repeat(np.arange(10), 2)
    clean = examples_of(rows=20)
    broken = Examples(clean.features.copy(), clean.labels, units)
    broken.features[7] = np.nan
    plan = plan_of(mode=mode, sample_rate=1.0, steps=1, max_records=2)

    got = train(perceptron(), cross_entropy, broken, plan=plan, noise=SeededSource(1))

    kept = [row for row in range(20) if row != 7]
    without = Examples(clean.features[kept], clean.labels[kept], units[kept])
    expected = train(perceptron(), cross_entropy, without, plan=plan, noise=SeededSource(1))
    np.testing.assert_allclose(got.update, expected.update, atol=1e-6)
    assert got.sanitised == 1


def test_a_model_that_has_diverged_still_releases_noise() -> None:
    model = perceptron()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)

    total, sanitised = sampled_clipped_sum(
        model, cross_entropy, examples_of(), plan=plan_of(sample_rate=1.0), noise=SeededSource(0)
    )

    assert not total.any()
    assert sanitised == 40


def test_the_whole_step_is_that_of_opacus_optimizer() -> None:
    from opacus import GradSampleModule

    examples = examples_of(rows=30)
    plan = plan_of(sample_rate=1.0, momentum=0.9, steps=4)
    model = perceptron()
    wrapped = GradSampleModule(perceptron())
    source = SeededSource(3)
    optimizer = SourcedOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9),
        noise_source=source,
        noise_multiplier=1.0,
        clip_norm=0.5,
        expected_batch_size=20.0,
    )

    ours = train(model, cross_entropy, examples, plan=plan, noise=SeededSource(3))
    x = torch.from_numpy(examples.features).requires_grad_()
    for _ in range(4):
        source.uniform(30)
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(x), torch.from_numpy(examples.labels)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    theirs = torch.cat([p.detach().flatten() for p in wrapped.parameters()]).numpy()
    trained = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    np.testing.assert_allclose(trained, theirs, atol=1e-6)
    assert ours.sanitised == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_are_those_of_torch(optimizer: Optimizer) -> None:
    rng = np.random.default_rng(0)
    ours = torch.from_numpy(rng.standard_normal(50).astype(np.float32))
    theirs = nn.Parameter(ours.clone())
    momentum = 0.9 if optimizer == "sgd" else 0.0
    rule = FlatOptimizer(ours, optimizer=optimizer, momentum=momentum, weight_decay=0.02)
    oracle: torch.optim.Optimizer
    match optimizer:
        case "sgd":
            oracle = torch.optim.SGD([theirs], lr=0.05, momentum=0.9, weight_decay=0.02)
        case "adam":
            oracle = torch.optim.Adam([theirs], lr=0.05, weight_decay=0.02)
        case "adamw":
            oracle = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.02)

    for _ in range(20):
        gradient = torch.from_numpy(rng.standard_normal(50).astype(np.float32))
        theirs.grad = gradient.clone()
        oracle.step()
        rule.step(gradient, learning_rate=0.05)

    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_of_any_size_is_that_of_torch(size: int, momentum: float) -> None:
    rng = np.random.default_rng(0)
    ours = torch.from_numpy(rng.standard_normal(size).astype(np.float32))
    theirs = nn.Parameter(ours.clone())
    rule = FlatOptimizer(ours, optimizer="sgd", momentum=momentum, weight_decay=0.0)
    oracle = torch.optim.SGD([theirs], lr=0.05, momentum=momentum)

    for _ in range(20):
        gradient = torch.from_numpy(rng.standard_normal(size).astype(np.float32))
        theirs.grad = gradient / 48
        oracle.step()
        rule.step(gradient, learning_rate=0.05, scale=1 / 48)

    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_without_privacy_a_step_is_plain_gradient_descent() -> None:
    examples = examples_of(rows=30)
    plan = plan_of(guarantee=NotPrivate(), sample_rate=1.0, steps=1, expected_batch_size=30.0)
    model = perceptron()

    result = train(model, cross_entropy, examples, plan=plan, noise=SeededSource(0))

    reference = perceptron()
    loss = functional.cross_entropy(
        reference(torch.from_numpy(examples.features)), torch.from_numpy(examples.labels)
    )
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    expected = torch.cat([g.flatten() for g in gradients]).numpy()
    np.testing.assert_allclose(result.update, -0.1 * expected, atol=1e-6)
    assert result.event is None


def test_without_privacy_a_broken_record_is_left_out_too() -> None:
    examples = examples_of(rows=10)
    examples.features[3] = np.nan
    plan = plan_of(guarantee=NotPrivate(), sample_rate=1.0, steps=1)

    result = train(perceptron(), cross_entropy, examples, plan=plan, noise=SeededSource(0))

    assert np.isfinite(result.update).all()
    assert result.sanitised == 1


def test_a_frozen_trunk_stays_out_of_update_and_clipping() -> None:
    examples = examples_of(rows=30)
    plan = plan_of(sample_rate=1.0, steps=2)
    updates = {}
    for mode in ("book-keeping", "hooks", "ghost"):
        model = perceptron()
        for p in model[0].parameters():  # type: ignore[index]
            p.requires_grad_(False)
        updates[mode] = train(
            model, cross_entropy, examples, plan=_with_mode(plan, mode), noise=SeededSource(2)
        ).update

    frozen, whole = 6 * 8 + 8, sum(p.numel() for p in perceptron().parameters())
    for update in updates.values():
        assert update.shape == (whole - frozen,)
        np.testing.assert_allclose(update, updates["hooks"], atol=1e-6)

    # Clipped as the head alone: the same as a linear model on the trunk's features.
    model = perceptron()
    with torch.no_grad():
        inner = model[1](model[0](torch.from_numpy(examples.features))).numpy()  # type: ignore[index]
    head = model[2]  # type: ignore[index]
    alone = train(
        head,
        cross_entropy,
        Examples(inner, examples.labels, examples.units),
        plan=plan,
        noise=SeededSource(2),
    )
    np.testing.assert_allclose(alone.update, updates["hooks"], atol=1e-6)


def test_training_leaves_a_model_of_its_own_memory_and_mode() -> None:
    model = perceptron().eval()
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    before = torch.cat([p.detach().flatten() for p in model.parameters()])

    result = train(model, cross_entropy, examples_of(), plan=plan_of(), noise=SeededSource(0))

    assert [p.untyped_storage().data_ptr() for p in model.parameters()] == storages
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    np.testing.assert_array_equal((after - before).numpy(), result.update)
    assert not model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_refused_plan_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()

    with pytest.raises(ValueError, match="cannot be trained with privacy"):
        train(model, cross_entropy, examples_of(), plan=plan_of(), noise=SeededSource(0))

    assert not model.training


def test_the_event_says_what_ran() -> None:
    import dp_accounting

    plan = plan_of(steps=7, sample_rate=0.25)

    event = train(linear(), cross_entropy, examples_of(), plan=plan, noise=SeededSource(0)).event

    step = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.0))
    assert event == dp_accounting.SelfComposedDpEvent(step, 7)


def test_nothing_is_drawn_from_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()

    for mode in fitting(linear, 1):
        torch.set_rng_state(before)
        model = linear()
        state = torch.get_rng_state()
        train(model, cross_entropy, examples_of(), plan=plan_of(mode=mode), noise=SeededSource(0))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"learning_rate": np.nan},
        {"expected_batch_size": -1.0},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"steps": 0},
        {"max_records": 0},
        {"momentum": 1.0},
        {"momentum": 0.9, "optimizer": "adam"},
        {"weight_decay": -1.0},
    ],
)
def test_a_plan_that_means_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        plan_of(**change)


@pytest.mark.parametrize(("clip_norm", "noise"), [(0.0, 1.0), (1.0, 0.0), (np.inf, 1.0)])
def test_privacy_is_never_switched_off_by_a_number(clip_norm: float, noise: float) -> None:
    with pytest.raises(ValueError, match="above 0 and finite"):
        Private(clip_norm=clip_norm, noise_multiplier=noise)


@pytest.mark.parametrize("mode", ["book-keeping", "hooks", "ghost", "functorch"])
@pytest.mark.parametrize("records", [1, 3])
def test_a_batch_in_parts_gives_the_same_step(mode: Mode, records: int) -> None:
    if mode == "ghost" and records > 1:
        pytest.skip("ghost knows one record a patient")
    examples = examples_of(rows=60, patients=25 if records > 1 else None)
    plan = plan_of(mode=mode, sample_rate=1.0, max_records=records)
    whole = train(perceptron(), cross_entropy, examples, plan=plan, noise=SeededSource(1))

    small = replace(plan, memory_limit_mb=0.002)
    parts = train(perceptron(), cross_entropy, examples, plan=small, noise=SeededSource(1))

    np.testing.assert_allclose(parts.update, whole.update, atol=1e-6)


def test_parts_of_a_batch_stay_below_the_limit() -> None:
    from fedward.client.training.session import session

    examples = examples_of(rows=60)
    with session(
        perceptron(), cross_entropy, examples, plan_of(mode="hooks", memory_limit_mb=0.01)
    ) as work:
        sizes = [part.patients for part in work._parts(work._sampler.draw(_everybody()))]

    gradients = 2 * (6 * 8 + 8 + 8 * 3 + 3) * 4  # bytes a patient, of gradients alone
    assert sum(sizes) == 60
    assert max(sizes) * gradients < 0.01 * 2**20
    assert max(sizes) > 1


def _everybody() -> ScriptedSource:
    return ScriptedSource(np.zeros)


@pytest.mark.parametrize("averaging", ["last", "tail", "ema"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_round_that_stopped_goes_on_without_taking_a_step_twice(
    optimizer: Optimizer, averaging: str
) -> None:
    class Stopped(Exception):
        pass

    states: list[TrainingState] = []

    def stop_after_four(state: TrainingState) -> None:
        states.append(state)
        if state.steps == 4:
            raise Stopped

    plan = plan_of(
        steps=9,
        optimizer=optimizer,
        momentum=0.9 if optimizer == "sgd" else 0.0,
        averaging=averaging,
        schedule="linear",
    )
    examples = examples_of()
    whole = train(perceptron(), cross_entropy, examples, plan=plan, noise=SeededSource(1))

    source = SeededSource(1)
    with pytest.raises(Stopped):
        train(
            perceptron(),
            cross_entropy,
            examples,
            plan=plan,
            noise=source,
            checkpoint=stop_after_four,
        )
    rest = train(perceptron(), cross_entropy, examples, plan=plan, noise=source, resume=states[-1])

    np.testing.assert_array_equal(rest.update, whole.update)
    assert rest.event == whole.event  # the round's steps, once


def test_a_state_of_another_plan_is_refused() -> None:
    states: list[TrainingState] = []
    train(
        perceptron(),
        cross_entropy,
        examples_of(),
        plan=plan_of(),
        noise=SeededSource(0),
        checkpoint=states.append,
    )

    for changed in (plan_of(optimizer="adam"), plan_of(averaging="ema"), plan_of(steps=1)):
        with pytest.raises(ValueError, match="state"):
            train(
                perceptron(),
                cross_entropy,
                examples_of(),
                plan=changed,
                noise=SeededSource(0),
                resume=states[-1],
            )


def test_averages_are_those_of_the_iterates() -> None:
    iterates: list[NDArray[np.float32]] = []
    plan = plan_of(steps=6, averaging="last")
    last = train(
        linear(),
        cross_entropy,
        examples_of(),
        plan=plan,
        noise=SeededSource(0),
        checkpoint=lambda state: iterates.append(state.arrays["parameters"]),
    ).update
    start = torch.cat([p.detach().flatten() for p in linear().parameters()]).numpy()
    iterates.append(start + last)

    def averaged(kind: str) -> NDArray[np.float32]:
        changed = plan_of(steps=6, averaging=kind, ema_decay=0.7)
        result = train(linear(), cross_entropy, examples_of(), plan=changed, noise=SeededSource(0))
        return result.update

    tail = np.mean(iterates[3:], axis=0)
    weights = 0.7 ** np.arange(5, -1, -1)
    moving = np.average(iterates, axis=0, weights=weights)
    np.testing.assert_allclose(averaged("tail"), tail - start, atol=1e-6)
    np.testing.assert_allclose(averaged("ema"), moving - start, atol=1e-6)


def test_adaptive_clipping_finds_the_quantile_at_the_same_price() -> None:
    examples = examples_of(rows=400)
    adaptive = Adaptive(quantile=0.5, learning_rate=0.3, count_noise=10.0)
    guarantee = Private(clip_norm=0.01, noise_multiplier=1.0, adaptive=adaptive)
    plan = plan_of(
        guarantee=guarantee,
        steps=80,
        sample_rate=0.5,
        expected_batch_size=200.0,
        learning_rate=1e-9,
    )

    result = train(linear(), cross_entropy, examples, plan=plan, noise=SeededSource(0))

    norms = []
    for row in range(400):
        model = linear()
        losses = cross_entropy(
            model(torch.from_numpy(examples.features[row : row + 1])),
            torch.from_numpy(examples.labels[row : row + 1]),
        )
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    # Noise of 10 on a count of 200 moves the clip norm by 1.5% a step.
    assert result.clip_norm == pytest.approx(np.median(norms), rel=0.25)
    assert (
        result.event
        == train(
            linear(),
            cross_entropy,
            examples,
            plan=replace(plan, guarantee=replace(guarantee, adaptive=None)),
            noise=SeededSource(0),
        ).event
    )


def test_gradients_and_count_together_cost_what_is_charged() -> None:
    guarantee = Private(clip_norm=1.0, noise_multiplier=1.3, adaptive=Adaptive(count_noise=2.0))

    # Two Gaussian releases of noise multipliers a and b are one of (a^-2 + b^-2)^-1/2;
    # the centred count has sensitivity 1/2.
    a, b = guarantee.gradient_noise_multiplier, 2.0 / 0.5
    assert (a**-2 + b**-2) ** -0.5 == pytest.approx(1.3)
    with pytest.raises(ValueError, match="count_noise"):
        Private(clip_norm=1.0, noise_multiplier=4.1, adaptive=Adaptive(count_noise=2.0))


def test_adaptive_clipping_divides_by_the_public_batch_size() -> None:
    """Opacus 1.6 divides the noised count by the batch's own, un-noised size."""
    adaptive = Adaptive(quantile=0.5, learning_rate=1.0, count_noise=10.0)
    guarantee = Private(clip_norm=1e-3, noise_multiplier=1.0, adaptive=adaptive)
    plan = plan_of(guarantee=guarantee, steps=1, expected_batch_size=100.0)
    nobody, everybody = ScriptedSource(np.ones), ScriptedSource(np.zeros)

    empty = train(linear(), cross_entropy, examples_of(), plan=plan, noise=nobody)
    full = train(linear(), cross_entropy, examples_of(), plan=plan, noise=everybody)

    assert empty.clip_norm == pytest.approx(1e-3)  # a share of 1/2, as centred
    # 40 patients, none within the bound: -20 over 100.
    assert full.clip_norm == pytest.approx(1e-3 * np.exp(0.2), rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_fall_over_all_rounds(schedule: str) -> None:
    first = plan_of(schedule=schedule, steps=5, schedule_steps=10)
    second = replace(first, first_step=5)

    rates = [first.learning_rate_at(i) for i in range(5)]
    rates += [second.learning_rate_at(i) for i in range(6)]

    done = np.arange(11) / 10
    expected = {
        "constant": np.ones(11),
        "linear": 1 - done,
        "cosine": (1 + np.cos(np.pi * done)) / 2,
    }[schedule]
    np.testing.assert_allclose(rates, 0.1 * expected, atol=1e-12)
