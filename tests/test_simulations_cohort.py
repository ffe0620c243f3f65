"""Many sites as one batch, against the code of a single site."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedward.client.training import NotPrivate, Private, TrainingPlan, train
from fedward.privacy.mechanisms import add_noise, simulated_source
from fedward.privacy.mechanisms.rows import add_noise_to_rows
from fedward.simulations import cohort
from fedward.simulations.cohort import Cohort, CohortSite, Turn
from fedward.simulations.stacked import fits
from fedward.tasks.models import build
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.task import Examples

FEATURES = 6
SILENT = 1e-9  # a noise multiplier that float32 does not show


def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(
        outputs.reshape(-1), labels.to(outputs.dtype), reduction="none"
    )


def make_examples(rows: int, *, seed: int, records: int = 1) -> Examples:
    rng = np.random.default_rng(seed)
    units = rng.permutation(rows) if records == 1 else rng.integers(0, max(1, rows // 2), rows)
    units = np.unique(units, return_inverse=True)[1].astype(np.int64)
    features = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    labels = (rng.random(rows) < 0.4).astype(np.float32)
    return Examples(features, labels, units)


def make_plan(number: int, *, private: float | None, **changes: object) -> TrainingPlan:
    values: dict[str, object] = {
        "learning_rate": 0.3,
        "momentum": 0.5,
        "steps": 3 + number % 4,
        "sample_rate": 0.3 + 0.1 * (number % 3),
        "expected_batch_size": 4.0 + number % 5,
        "guarantee": NotPrivate()
        if private is None
        else Private(clip_norm=0.7, noise_multiplier=private * (1 + 0.1 * (number % 2))),
    }
    return TrainingPlan(**{**values, **changes})  # type: ignore[arg-type] # a test's keywords


def both(
    model: nn.Module, sites: list[CohortSite]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Updates of the sites, one by one and as one batch, from the same sources."""
    start = to_vector(model)
    alone = []
    for number, site in enumerate(sites):
        from_vector(model, start)
        noise = simulated_source("cohort", number)
        alone.append(train(model, loss, site.examples, plan=site.plan, noise=noise).update)
    turns = [
        Turn(number, lambda number=number: simulated_source("cohort", number))  # type: ignore[misc]
        for number in range(len(sites))
    ]
    together = list(Cohort(model, loss, sites).train(start, turns))
    return np.stack(alone), np.stack(together)


def closeness(alone: NDArray[np.float32], together: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(alone, axis=1) + 1e-12
    return float((np.linalg.norm(alone - together, axis=1) / lengths).max())


@pytest.mark.parametrize("name", ["logistic", "mlp"])
@pytest.mark.parametrize("private", [None, SILENT, 1.1])
@pytest.mark.parametrize("records", [1, 3])
def test_a_batch_of_ragged_sites_trains_as_each_alone_noise_included(
    name: str, private: float | None, records: int
) -> None:
    sites = [
        CohortSite(
            make_examples(rows, seed=rows, records=records),
            make_plan(number, private=private, max_records=records),
        )
        for number, rows in enumerate([1, 3, 8, 13, 40, 7, 2])
    ]

    alone, together = both(build(name, num_features=FEATURES), sites)

    assert closeness(alone, together) < 1e-5
    assert np.linalg.norm(alone) > 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_optimizers_with_memory_end_at_each_sites_own_step(optimizer: str) -> None:
    changes = {"optimizer": optimizer, "momentum": 0.0, "weight_decay": 0.01}
    sites = [
        CohortSite(make_examples(9 + n, seed=n), make_plan(n, private=1.0, **changes))
        for n in range(6)
    ]

    alone, together = both(build("mlp", num_features=FEATURES), sites)

    assert closeness(alone, together) < 1e-4  # Adam divides by what is nearly zero


def test_patients_with_more_records_than_a_step_takes_are_drawn_alike() -> None:
    sites = [
        CohortSite(make_examples(20 + n, seed=n, records=3), make_plan(n, private=1.0))
        for n in range(4)
    ]

    alone, together = both(build("logistic", num_features=FEATURES), sites)

    assert closeness(alone, together) < 1e-5


def test_everybody_in_every_step_needs_no_draw_without_privacy() -> None:
    sites = [
        CohortSite(make_examples(6 + n, seed=n), make_plan(n, private=None, sample_rate=1.0))
        for n in range(4)
    ]
    model = build("mlp", num_features=FEATURES)
    alone, _ = both(model, sites)

    def forbidden() -> object:
        raise AssertionError("a draw that nobody needs")

    from_vector(model, to_vector(build("mlp", num_features=FEATURES)))
    turns = [Turn(number, forbidden) for number in range(len(sites))]  # type: ignore[arg-type] # never called
    together = list(Cohort(model, loss, sites).train(to_vector(model), turns))

    assert closeness(alone, np.stack(together)) < 1e-5


@pytest.mark.parametrize("private", [None, 1.0])
def test_a_record_that_is_not_finite_is_left_out_as_it_is_alone(private: float | None) -> None:
    sites = []
    for number in range(4):
        examples = make_examples(12, seed=number)
        if number == 2:
            examples.features[:4, 1] = np.nan
        sites.append(CohortSite(examples, make_plan(number, private=private, sample_rate=1.0)))

    alone, together = both(build("mlp", num_features=FEATURES), sites)

    assert np.isfinite(together).all()
    assert closeness(alone, together) < 1e-5


def test_frozen_parameters_do_not_move() -> None:
    model = build("mlp", num_features=FEATURES)
    for p in model[0].parameters():
        p.requires_grad = False
    sites = [CohortSite(make_examples(9, seed=n), make_plan(n, private=1.0)) for n in range(4)]

    alone, together = both(model, sites)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert together.shape == (4, trained)
    assert together.any(axis=0).all()
    assert closeness(alone, together) < 1e-5


def test_a_few_sites_of_the_cohort_may_take_part() -> None:
    sites = [CohortSite(make_examples(9, seed=n), make_plan(n, private=1.0)) for n in range(5)]
    model = build("logistic", num_features=FEATURES)
    _, together = both(model, sites)
    start = to_vector(build("logistic", num_features=FEATURES))

    turns = [Turn(n, lambda n=n: simulated_source("cohort", n)) for n in (3, 1)]  # type: ignore[misc]
    some = list(Cohort(model, loss, sites).train(start, turns))

    np.testing.assert_allclose(np.stack(some), together[[3, 1]], rtol=1e-5, atol=1e-7)


def test_noise_of_a_batch_has_the_calibrated_standard_deviation_at_every_site() -> None:
    # Nobody is ever sampled, so a step is noise alone: sum of squares is chi-squared.
    steps, sigma, clip_norm, batch = 40, 1.5, 0.7, 5.0
    plan = make_plan(
        0, private=sigma, steps=steps, sample_rate=1e-12, momentum=0.0, learning_rate=1.0,
        expected_batch_size=batch,
    )  # fmt: skip
    model = build("mlp", num_features=FEATURES)
    sites = [CohortSite(make_examples(3, seed=n), plan) for n in range(8)]

    _, together = both(model, sites)

    std = sigma * clip_norm / batch * np.sqrt(steps)
    for update in together:
        ratio = float((update.astype(np.float64) ** 2).mean()) / std**2
        # Six deviations of a mean of n squares, and a little: a false alarm in 10^9 runs.
        assert abs(ratio - 1) < 6.5 * np.sqrt(2 / update.size)


def test_sites_that_differ_in_more_than_size_are_no_cohort() -> None:
    sites = [
        CohortSite(make_examples(5, seed=1), make_plan(0, private=None)),
        CohortSite(make_examples(5, seed=1), make_plan(0, private=None, learning_rate=0.1)),
    ]

    with pytest.raises(ValueError, match="differ"):
        Cohort(build("logistic", num_features=FEATURES), loss, sites)


def test_a_model_that_book_keeping_does_not_know_is_not_stacked() -> None:
    assert fits(build("mlp", num_features=FEATURES))
    assert not fits(nn.Sequential(nn.Bilinear(2, 2, 1)))


def test_noise_for_all_sites_at_once_is_each_sites_own_to_the_bit() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 37)).astype(np.float32)
    stds = [0.3, 1.0, 1.7, 64.0, 1e-6]

    for scale in (1e-6, 1.0, 1e4):  # all of it fits single precision, some of it, none
        scaled = rows * np.float32(scale)

        together = add_noise_to_rows(
            scaled,
            stds=stds,
            sensitivities=[0.7] * 5,
            sources=[simulated_source(n) for n in range(5)],
        )

        for number, (row, std) in enumerate(zip(scaled, stds, strict=True)):
            alone = add_noise(row, std=std, sensitivity=0.7, source=simulated_source(number))
            assert together[number].tobytes() == alone.tobytes()
        assert together.dtype == np.float32


@pytest.mark.parametrize("std", [0.0, -1.0, np.nan, np.inf])
def test_one_site_without_noise_stops_the_release_of_all(std: float) -> None:
    sources = [simulated_source(1), simulated_source(2)]
    with pytest.raises(ValueError, match="positive and finite"):
        add_noise_to_rows(
            np.zeros((2, 3), np.float32), stds=[1.0, std], sensitivities=[1.0, 1.0], sources=sources
        )


def test_a_row_that_is_not_finite_is_not_released() -> None:
    rows = np.array([[0.0, 1.0], [np.inf, 0.0]], np.float32)
    sources = [simulated_source(1), simulated_source(2)]
    with pytest.raises(ValueError, match="not finite"):
        add_noise_to_rows(rows, stds=[1.0, 1.0], sensitivities=[1.0, 1.0], sources=sources)


@pytest.mark.parametrize(("room", "stacks"), [(5.5, [5, 5, 2]), (4.5, [4, 4, 4]), (11.5, [12])])
def test_sites_that_do_not_fit_one_stack_train_as_each_alone(
    room: float, stacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left over is a stack of its own, or goes with the last if it is small."""
    model = build("logistic", num_features=FEATURES)
    plan = make_plan(0, private=1.0)
    sites = [CohortSite(make_examples(20, seed=number), plan) for number in range(12)]
    one = 16 * (FEATURES + 1) + 4 * 4 * FEATURES * 6  # parameters, and six rows of twenty
    monkeypatch.setattr(cohort, "_STACK_BYTES", room * one)
    sizes: list[int] = []
    train_stack = Cohort._train_stack

    def noted(self: Cohort, flat: torch.Tensor, turns: list[Turn]) -> list[NDArray[np.float32]]:
        sizes.append(len(turns))
        return train_stack(self, flat, turns)

    monkeypatch.setattr(Cohort, "_train_stack", noted)

    alone, together = both(model, sites)

    assert sizes == stacks
    assert closeness(alone, together) < 1e-5
