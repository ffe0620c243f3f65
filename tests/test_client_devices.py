"""Where a site trains: the model and the examples go to the device, the noise is the site's own."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from studies import CSV_SITE
from test_simulate_units import PATIENT, consortium
from torch import nn

from fedward.client.answers import admit_study
from fedward.client.conformance import FAMILIES
from fedward.client.devices import choose_device
from fedward.client.local_site import LocalSite
from fedward.client.training import (
    Adaptive,
    NotPrivate,
    Private,
    TrainingPlan,
    TrainingState,
    sampled_clipped_sum,
    train,
    weighted,
)
from fedward.client.training.optimizers import FlatOptimizer
from fedward.client.training.plan import Optimizer
from fedward.client.training.session import session
from fedward.core.errors import ConfigError
from fedward.core.study import load_study
from fedward.privacy.mechanisms import simulated_source
from fedward.tasks.losses import cross_entropy
from fedward.tasks.task import Examples
from fedward.transport.payload import Payload

CUDA = "cuda"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def site_file(folder: Path, device: str) -> Path:
    file = folder / "site.toml"
    file.write_text(CSV_SITE.replace("[data]", f'device = "{device}"\n[data]', 1))
    return file


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_gpu_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'\[site\] device = "cuda".*use "auto" or "cpu"'):
        LocalSite(site_file(tmp_path, "cuda"))

    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", ""])
def test_a_device_of_another_kind_is_no_site_file(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        LocalSite(site_file(tmp_path, device))


@pytest.mark.parametrize(
    ("asked", "count", "simulated", "chosen"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 1, False, "cuda"),
        ("auto", 1, True, "cpu"),
        ("cpu", 1, False, "cpu"),
        ("cuda", 1, True, "cuda"),
        ("cuda:1", 2, False, "cuda:1"),
    ],
)
def test_auto_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, asked: str, count: int, simulated: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    device = choose_device(asked, file="site.toml", simulated=simulated)

    assert device == torch.device(chosen)
    # Ten bits of precision would let a clipped gradient be longer than the bound.
    assert torch.backends.cudnn.allow_tf32 == (device.type == "cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_second_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(ConfigError, match="finds 1 CUDA devices"):
        choose_device("cuda:1", file="site.toml")


def examples_of(family: str) -> Examples:
    records = FAMILIES[family].records()
    units = np.arange(len(records.labels), dtype=np.int64)
    return Examples(records.features, records.labels, units)


def built(family: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].build().to(device)


class Went(Exception):
    """A model was sent somewhere."""


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_sites_training_takes_its_model_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from fedward.client import answers

    file = consortium(tmp_path, privacy=PATIENT)
    site, study = LocalSite(tmp_path / "sites" / "a.toml"), load_study(file)
    admit_study(site, Payload({"study": study.agreed(), "hash": study.hash}))
    admitted = site.admitted(study.hash)
    site.device = torch.device("meta")  # any other will do: it only has to get there

    def note(_model: nn.Module, device: Any) -> nn.Module:
        raise Went(device)

    monkeypatch.setattr(nn.Module, "to", note)
    zeros = np.zeros(site.size(study), np.float32)

    work: Callable[[], object] = (
        partial(site.train, admitted, zeros, round_number=1)
        if mode == "local"
        else partial(answers._own_sum, site, answers.Round(admitted, zeros, 1))
    )

    with pytest.raises(Went, match="meta"):
        work()


def test_examples_go_where_the_model_is() -> None:
    plan = plan_of(NotPrivate())
    model = built("perceptron", "meta")

    with session(model, cross_entropy, examples_of("perceptron"), plan) as work:
        batch = work.draw(simulated_source(1))

        assert batch.features.device.type == batch.labels.device.type == "meta"
        assert work.flat.device.type == "meta"


@pytest.mark.parametrize("records", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_clipped_and_added_up_where_the_model_is(family: str, records: int) -> None:
    """On a device of shapes alone: code that is for the processor's memory would fail on it."""
    examples = examples_of(family)
    patients = Examples(examples.features, examples.labels, examples.units // records)
    plan = plan_of(Private(clip_norm=0.5, noise_multiplier=1.0), max_records=records)
    size = sum(p.numel() for p in built(family, "cpu").parameters())

    with session(built(family, "meta"), cross_entropy, patients, plan) as work, torch.no_grad():
        total, squared = work._clipper._run(work.draw(simulated_source(1)), 0.5)  # type: ignore[attr-defined] # without the look at the norms, which a device of shapes has not

    assert total.device.type == squared.device.type == "meta"
    assert total.shape == (size,)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.5), ("adam", 0.0), ("adamw", 0.0)]
)
def test_a_step_is_taken_where_the_model_is(
    optimizer: Optimizer, momentum: float, weight_decay: float
) -> None:
    parameters = torch.zeros(50, device="meta")
    rule = FlatOptimizer(
        parameters, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay
    )

    for _ in range(2):
        rule.step(torch.ones(50, device="meta"), learning_rate=0.1, scale=0.5)

    assert {value.device.type for value in rule._state.values()} <= {"meta"}


def plan_of(guarantee: Private | NotPrivate, **more: Any) -> TrainingPlan:
    plan = TrainingPlan(
        learning_rate=0.1,
        steps=4,
        sample_rate=0.6,
        expected_batch_size=12.0,
        guarantee=guarantee,
    )
    return replace(plan, **more)


PLANS = {
    "private": plan_of(Private(clip_norm=0.5, noise_multiplier=1.0)),
    "not private": plan_of(NotPrivate(), momentum=0.5),
    "adam": plan_of(Private(clip_norm=0.5, noise_multiplier=1.0), optimizer="adam"),
    "averaged": plan_of(
        Private(clip_norm=0.5, noise_multiplier=1.0, adaptive=Adaptive(count_noise=2.0)),
        momentum=0.5,
        averaging="ema",
        proximal=0.1,
        memory_limit_mb=0.05,
    ),
}


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_gpu_gives_the_same_update_up_to_rounding(family: str, plan: str) -> None:
    def update(device: str) -> NDArray[np.float32]:
        choose_device(device, file="here")
        return train(
            built(family, device),
            weighted(cross_entropy, [1.0] * 10),
            examples_of(family),
            plan=PLANS[plan],
            noise=simulated_source("same"),
        ).update

    np.testing.assert_allclose(update(CUDA), update("cpu"), rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_clips_to_the_same_bound(family: str) -> None:
    choose_device(CUDA, file="here")
    records = examples_of(family)
    plan = plan_of(Private(clip_norm=1e-3, noise_multiplier=1.0), sample_rate=1.0)

    for row in range(len(records)):
        total, _ = sampled_clipped_sum(
            built(family, CUDA),
            cross_entropy,
            records.take([row]),
            plan=plan,
            noise=simulated_source(0),
        )
        assert np.linalg.norm(total) <= 1e-3 * (1 + 1e-5)


@needs_cuda
def test_a_round_on_a_gpu_stops_and_goes_on() -> None:
    kept: list[TrainingState] = []

    def run(device: str, **more: Any) -> NDArray[np.float32]:
        return train(
            built("perceptron", device),
            cross_entropy,
            examples_of("perceptron"),
            plan=PLANS["adam"],
            noise=simulated_source("same"),
            **more,
        ).update

    run(CUDA, checkpoint=kept.append)
    resumed = [run(device, resume=kept[1]) for device in (CUDA, "cpu")]

    np.testing.assert_allclose(resumed[0], resumed[1], rtol=1e-3, atol=1e-4)
