"""Class weights of a study, from its file to what is released."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from studies import EPSILON_4, NO_PRIVACY, change, write_study
from test_simulate_clipping import HASH_BEFORE

from fedward.client.local_site import LocalSite
from fedward.client.objective import study_loss
from fedward.client.plan import plan_site, training_plan
from fedward.client.training import sampled_clipped_sum
from fedward.core.errors import ConfigError
from fedward.core.study import Study, load_study, parse_study
from fedward.privacy.accounting.events import leaves
from fedward.privacy.mechanisms import simulated_source
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.losses import DifferentiatedLoss
from fedward.tasks.registry import get_task
from fedward.tasks.schema import Field
from fedward.tasks.weights import class_weights

Vector = NDArray[np.float64]
ROUNDS, RATE = 4, 0.5
MANY = """
[simulation]
partition = "dirichlet"
engine = "{engine}"
[simulation.args]
num_sites = 10
"""


def weighted_study(
    folder: Path, weights: str, *, privacy: str = NO_PRIVACY, extra: str = ""
) -> Path:
    return change(
        write_study(folder, privacy=privacy, rounds=ROUNDS, extra=extra),
        ("learning_rate = 1.0", f"learning_rate = {RATE}\n{weights}"),
        ("sample_rate = 0.3", "sample_rate = 1.0"),
    )


def by_hand(study: Study, sites: list[LocalSite], weights: tuple[float, float]) -> Vector:
    """Federated averaging of logistic regressions with weighted examples."""
    task = get_task(study.study.task)
    sizes = [s.site.data.public_size * (1 - s.site.data.held_out) for s in sites]
    model, kept = np.zeros(28), []
    for _ in range(ROUNDS):
        locals_ = []
        for site, size in zip(sites, sizes, strict=True):
            examples, _ = site.examples(task, study)
            x = np.column_stack([examples.features, np.ones(len(examples.labels))])
            error = 1 / (1 + np.exp(-x @ model)) - examples.labels
            error = error * np.where(examples.labels > 0.5, weights[1], weights[0])
            locals_.append(model - RATE * x.T @ error / size)
        model = np.average(locals_, axis=0, weights=sizes)
        kept.append(model)
    return np.asarray(np.mean(kept[ROUNDS // 2 :], axis=0), dtype=np.float64)


@pytest.mark.parametrize("engine", ["per-site", "vectorised"])
@pytest.mark.parametrize(
    ("weights", "means"),
    [
        ("class_weights = [0.5, 4.0]", (0.5, 4.0)),
        ('class_weights = "balanced"\nprevalence = 0.2', (0.625, 2.5)),
    ],
)
def test_a_run_is_what_it_is_by_hand_with_either_engine(
    tmp_path: Path, engine: str, weights: str, means: tuple[float, float]
) -> None:
    file = weighted_study(tmp_path, weights, extra=MANY.format(engine=engine))
    run = prepare_run(file, tmp_path / "run")

    simulate(file, run)

    arrays = load_file(run.path / "release" / "model.safetensors")
    (weight,) = (value for name, value in arrays.items() if name.endswith("weight"))
    (bias,) = (value for name, value in arrays.items() if name.endswith("bias"))
    sites = [LocalSite(path) for path in sorted((run.path / "sites").glob("*.toml"))]
    card = json.loads((run.path / "release" / "card.json").read_text())
    assert "not calibrated" in card["facts"]["bias_mitigation"]
    chosen = next(event for event in run.events() if event["event"] == "engine")
    assert chosen["engine"] == engine
    np.testing.assert_allclose(
        np.append(weight.ravel(), bias.ravel()),
        by_hand(load_study(file), sites, means),
        rtol=0,
        atol=2e-5,
    )


def test_weights_change_what_is_agreed_and_not_what_is_charged(tmp_path: Path) -> None:
    reserved, hashes = [], set()
    for name, weights in (("plain", ""), ("weighted", "class_weights = [1.0, 9.0]")):
        file = weighted_study(tmp_path / name, weights, privacy=EPSILON_4)
        run = prepare_run(file, tmp_path / name / "run")
        simulate(file, run)
        hashes.add(load_study(file).hash)
        ledger = LocalSite(run.path / "sites" / "va.toml").ledger
        reserved.append([leaves(e.event) for e in ledger.entries() if e.kind == "reserve"])

    assert len(hashes) == 2
    assert reserved[0] == reserved[1]


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_no_patient_moves_the_sum_by_more_than_the_clip_norm(tmp_path: Path, model: str) -> None:
    file = weighted_study(tmp_path, "class_weights = [0.1, 10.0]", privacy=EPSILON_4)
    file.write_text(file.read_text().replace('"logistic"', f'"{model}"'))
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    study = load_study(file)
    site = LocalSite(run.path / "sites" / "va.toml")
    task = get_task(study.study.task)
    plan = training_plan(study, plan_site(study, site.site), round_number=1)
    examples, _ = site.examples(task, study)

    moves = []
    for row in range(0, len(examples), 5):
        total, _ = sampled_clipped_sum(
            task.model(model),
            study_loss(study, task),
            examples.take([row]),
            plan=replace(plan, sample_rate=1.0),
            noise=simulated_source(0),
        )
        moves.append(float(np.linalg.norm(total)))

    assert max(moves) <= study.privacy.clip_norm * (1 + 1e-6)
    # A weight of ten brings the rare class to the bound, a tenth keeps the other one away from it.
    assert max(moves) > 0.99 * study.privacy.clip_norm
    assert min(moves) < 0.5 * study.privacy.clip_norm


def test_the_derivative_that_a_loss_brings_is_weighted_too(tmp_path: Path) -> None:
    study = load_study(weighted_study(tmp_path, "class_weights = [0.5, 4.0]"))
    loss = study_loss(study, get_task("heart-disease"))
    outputs = torch.randn(8, 1, requires_grad=True)
    labels = torch.tensor([0.0, 1.0] * 4)

    (expected,) = torch.autograd.grad(loss(outputs, labels).sum(), outputs)
    assert isinstance(loss, DifferentiatedLoss)  # heart disease's is one
    found = loss.output_gradient(outputs.detach().numpy(), labels.numpy())

    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_a_rare_class_has_no_more_than_the_largest_weight(tmp_path: Path) -> None:
    study = load_study(weighted_study(tmp_path, 'class_weights = "balanced"\nprevalence = 0.01'))

    weights = class_weights(study, get_task("heart-disease").schema)

    assert weights == pytest.approx((1 / 1.98, 10.0))


def test_shares_of_several_classes_balance_them(tmp_path: Path) -> None:
    text = 'class_weights = "balanced"\nprevalence = [0.5, 0.3, 0.2]'
    study = load_study(weighted_study(tmp_path, text))
    schema = get_task("heart-disease").schema
    label = Field(
        name="stage", kind="category", description="", categories=("a", "b", "c"), role="label"
    )
    fields = tuple(label if field.role == "label" else field for field in schema.fields)

    assert class_weights(study, replace(schema, fields=fields)) == pytest.approx(
        (1 / 1.5, 1 / 0.9, 1 / 0.6)
    )


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("class_weights = [1.0]", r"\[training\] class_weights has to be 2 numbers"),
        ("class_weights = [1.0, 11.0]", "at most 10"),
        ("class_weights = [0.0, 1.0]", "above 0"),
        ('class_weights = "balanced"', "prevalence, a public number"),
        ('class_weights = "balanced"\nprevalence = 1.5', "shares in"),
        ('class_weights = "balanced"\nprevalence = [0.5, 0.2]', "add up to 1"),
        ('class_weights = "balanced"\nprevalence = [0.5, 0.3, 0.2]', "2 shares"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_sent(
    tmp_path: Path, weights: str, says: str
) -> None:
    file = weighted_study(tmp_path, weights)
    run = prepare_run(file, tmp_path / "run")

    with pytest.raises(ConfigError, match=says):
        simulate(file, run)

    assert not [event for event in run.events() if event["event"] == "admitted"]


def test_a_prevalence_without_balance_is_refused(tmp_path: Path) -> None:
    text = weighted_study(tmp_path, "class_weights = [1.0, 2.0]\nprevalence = 0.3").read_text()

    with pytest.raises(ConfigError, match="prevalence belongs"):
        parse_study(text)


def test_a_study_without_weights_is_hashed_as_before_there_were_any(tmp_path: Path) -> None:
    assert load_study(write_study(tmp_path)).hash == HASH_BEFORE
