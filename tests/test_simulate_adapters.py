"""Frozen trunks and low-rank adapters of a study, from its file to what is released and served."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from pretrained_task import HIDDEN, public_trunk
from safetensors.numpy import load_file
from studies import EPSILON_4, NO_PRIVACY, change, write_study
from test_simulate_clipping import HASH_BEFORE
from torch import nn

from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study
from fedward.server.checkpoint import load_checkpoint
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.golden import raw_probabilities
from fedward.tasks.parameters import from_named, to_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import published_model, study_model

TASK = "pretrained_task:PRETRAINED"
ROUNDS, RATE = 4, 0.5
FREEZE = 'freeze = ["0"]'
ADAPT = 'adapters = { layers = ["0"], rank = 2, scale = 4.0 }'
ENGINE = """
[simulation]
dataset = "heart-disease"
partition = "{partition}"
engine = "{engine}"
"""
TEN = ENGINE + "[simulation.args]\nnum_sites = 10\n"


def partly(
    folder: Path, training: str, *, privacy: str = NO_PRIVACY, many: bool = False, engine: str = ""
) -> Path:
    """A study of the perceptron of which a part is trained; its file."""
    more = (TEN if many else ENGINE).format(
        engine=engine or "per-site", partition="dirichlet" if many else "natural"
    )
    return change(
        write_study(folder, privacy=privacy, rounds=ROUNDS, extra=more),
        ('task = "heart-disease"', f'task = "{TASK}"'),
        ('name = "logistic"', f'name = "mlp"\nargs = {{ hidden = {HIDDEN} }}'),
        ("learning_rate = 1.0", f"learning_rate = {RATE}\n{training}"),
        ("sample_rate = 0.3", "sample_rate = 1.0"),
        ("average_last = 0.5", "average_last = 0.0"),
    )


def run_of(file: Path) -> tuple[RunDirectory, dict[str, Any]]:
    run = prepare_run(file, file.parent / "run")
    return run, simulate(file, run)


def released(run: RunDirectory) -> dict[str, NDArray[np.float32]]:
    return dict(load_file(run.path / "release" / "model.safetensors"))


def by_hand(study: Study, sites: list[LocalSite]) -> nn.Module:
    """Federated averaging by autograd of whatever the study trains, everybody in every step."""
    task = get_task(study.study.task)
    model = study_model(study, task)
    sizes = [s.site.data.public_size * (1 - s.site.data.held_out) for s in sites]
    for _ in range(ROUNDS):
        locals_ = []
        for site, size in zip(sites, sizes, strict=True):
            examples, _ = site.examples(task, study)
            mine = copy.deepcopy(model)
            optimizer = torch.optim.SGD((p for p in mine.parameters() if p.requires_grad), lr=RATE)
            losses = task.loss(
                mine(torch.from_numpy(examples.features)), torch.from_numpy(examples.labels)
            )
            torch.autograd.backward(losses.sum() / size)
            optimizer.step()
            locals_.append(mine)
        with torch.no_grad():
            for parts in zip(model.parameters(), *(m.parameters() for m in locals_), strict=True):
                mean = sum(w * p for w, p in zip(sizes, parts[1:], strict=True)) / sum(sizes)
                parts[0].copy_(torch.as_tensor(mean))
    published_model(model)
    return model


@pytest.mark.parametrize("training", [FREEZE, ADAPT, f"{FREEZE}\n{ADAPT}"])
@pytest.mark.parametrize("engine", ["per-site", "vectorised"])
def test_a_run_is_what_it_is_by_hand_with_either_engine(
    tmp_path: Path, training: str, engine: str
) -> None:
    file = partly(tmp_path, training, many=True, engine=engine)

    run, _ = run_of(file)

    sites = [LocalSite(path) for path in sorted((run.path / "sites").glob("*.toml"))]
    expected = dict(by_hand(load_study(file), sites).named_parameters())
    found = released(run)
    chosen = next(event for event in run.events() if event["event"] == "engine")
    assert chosen["engine"] == engine
    assert set(found) == set(expected)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name].detach().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("training", "trained"),
    [("", 27 * HIDDEN + HIDDEN + HIDDEN + 1), (FREEZE, HIDDEN + 1), (ADAPT, 2 * 33 + HIDDEN + 1)],
)
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_only_what_is_trained_travels_and_is_noised(
    tmp_path: Path, training: str, trained: int, mode: str
) -> None:
    file = partly(tmp_path, training, privacy=EPSILON_4.replace("local", mode))
    if mode == "distributed":
        file.write_text(file.read_text().replace("secure = false", "secure = true"))

    run, result = run_of(file)

    checkpoint = load_checkpoint(run.path / "checkpoints", study_hash=load_study(file).hash)
    assert checkpoint is not None
    assert checkpoint.state.parameters.shape == (trained,)
    weight, bias = public_trunk()
    assert np.array_equal(released(run)["0.weight"], weight) == (training == FREEZE)
    # The adapter corrects the weight alone.
    assert np.array_equal(released(run)["0.bias"], bias) == (training != "")
    assert result["privacy"]["epsilon"] <= 4.0


@pytest.mark.parametrize("training", [FREEZE, ADAPT])
def test_the_release_is_the_tasks_own_model_and_its_onnx_says_the_same(
    tmp_path: Path, training: str
) -> None:
    run, _ = run_of(partly(tmp_path, training, privacy=EPSILON_4))
    task = get_task(TASK)
    # As a hospital's acceptance builds it, which knows of no adapter.
    model = task.model("mlp", hidden=HIDDEN)
    from_named(model, released(run))
    model.eval()
    golden = np.load(run.path / "release" / "golden.npz")

    expected = raw_probabilities(task, model, golden["inputs"], None)

    session = ort.InferenceSession(run.path / "release" / "model.onnx")
    (served,) = session.run(None, {"input": golden["inputs"]})
    np.testing.assert_allclose(served, expected, atol=1e-5)
    np.testing.assert_allclose(golden["outputs"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ('freeze = ["first"]', r'\[training\] freeze has "first".*layers are: 0, 2'),
        ('freeze = ["1"]', "layers are: 0, 2"),  # an activation
        ('freeze = ["0", "2"]', "nothing of the model to train"),
        ('adapters = { layers = ["1"], rank = 2 }', "linear layers are: 0, 2"),
        ('adapters = { layers = ["2"], rank = 1 }', "lower the rank"),
        ('adapters = { layers = ["0"], rank = 5 }', "165 parameters to train, and it has 162"),
        ("adapters = { layers = [], rank = 1 }", "layers"),
        ('adapters = { layers = ["0"], rank = 0 }', "rank"),
    ],
)
def test_what_the_model_has_not_is_refused_before_anything_is_sent(
    tmp_path: Path, training: str, says: str
) -> None:
    file = partly(tmp_path, training)

    with pytest.raises(ConfigError, match=says):
        run_of(file)


def test_a_study_that_trains_everything_is_hashed_as_before_there_was_a_choice(
    tmp_path: Path,
) -> None:
    assert load_study(write_study(tmp_path)).hash == HASH_BEFORE


def test_frozen_parameters_are_in_no_vector_and_in_every_release(tmp_path: Path) -> None:
    study = load_study(partly(tmp_path, FREEZE))
    task = get_task(TASK)

    model = study_model(study, task)

    assert to_vector(model).size == HIDDEN + 1
    assert to_vector(task.model("mlp", hidden=HIDDEN)).size == 27 * HIDDEN + 2 * HIDDEN + 1
