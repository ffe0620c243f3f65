"""Occlusion of a picture: what covering a window takes away, as Captum has it."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from release_samples import MODEL, SIGNATURE, WEIGHTS, publish_sample
from serving_client import ask

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.core.study import parse_study
from fedward.server.publisher import publish
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.occlusion import Grid, occlude
from fedward.serving.service import Service
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.schema import Field, Schema
from fedward.tasks.tabular import BinaryTabularTask

_IDENTITY = Identity.generate_publisher()
_RNG = np.random.default_rng(0)
_KERNEL = _RNG.normal(size=(6, 5, 2))


def _log_odds(pictures: NDArray[np.float64]) -> NDArray[np.float64]:
    """No line: products of neighbours, too."""
    return np.asarray(
        (pictures * _KERNEL).sum(axis=(1, 2, 3))
        + (pictures[:, 1:] * pictures[:, :-1]).sum(axis=(1, 2, 3)) / 20
    )


def _predict(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    scores = _log_odds(rows.reshape(-1, 6, 5, 2).astype(float) / 8)
    return np.asarray(1 / (1 + np.exp(-scores[:, None])), np.float32)


def test_a_pixel_loses_the_mean_of_the_windows_that_cover_it() -> None:
    inputs, cover = _RNG.random((2, 60)).astype(np.float32)
    grid = Grid(6, 5, (2, 3))

    got = occlude(_predict, inputs, cover, grid).reshape(6, 5, 2)

    whole = float(_log_odds(inputs.reshape(1, 6, 5, 2) / 8)[0])
    for row, column in ((0, 0), (3, 2), (5, 4)):
        losses = []
        for top in range(5):
            for left in range(3):
                if top <= row < top + 2 and left <= column < left + 3:
                    hidden = inputs.reshape(1, 6, 5, 2).copy()
                    part = (0, slice(top, top + 2), slice(left, left + 3))
                    hidden[part] = cover.reshape(1, 6, 5, 2)[part]
                    losses.append(whole - float(_log_odds(hidden / 8)[0]))
        np.testing.assert_allclose(got[row, column], np.mean(losses), atol=1e-5)


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (6, 5)])
def test_it_is_captums_occlusion(window: tuple[int, int]) -> None:
    pytest.importorskip("captum")
    occlusion = importlib.import_module("captum.attr").Occlusion
    inputs, cover = _RNG.random((2, 60)).astype(np.float32)

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(_log_odds(pictures.numpy().astype(float) / 8))

    wanted = occlusion(forward).attribute(
        torch.from_numpy(inputs.reshape(1, 6, 5, 2)),
        sliding_window_shapes=(*window, 2),
        baselines=torch.from_numpy(cover.reshape(1, 6, 5, 2)),
    )

    got = occlude(_predict, inputs, cover, Grid(6, 5, window))
    np.testing.assert_allclose(got, wanted.numpy().ravel(), atol=1e-5)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    folder: Path = tmp_path_factory.mktemp("occlusion")
    release = read_release(publish_sample(folder, _IDENTITY), _IDENTITY.public)
    return App(Service(Catalogue([start_engine(release)])))


def test_it_is_asked_for_with_the_pictures_size(app: App) -> None:
    rows = {"instances": [[63, 1, 240, 1]]}
    path = f"/v1/models/{MODEL}:explain?method=occlusion"

    (said,) = ask(app, "POST", f"{path}&grid=2x2", rows).json["explanations"]
    both = ask(app, "POST", f"{path}&grid=2x1&window=1x1", rows).json["explanations"][0]

    lost = {part["field"]: part["contribution"] for part in said["contributions"]}
    assert lost["sex"] == pytest.approx(float(WEIGHTS[1]), abs=1e-4)  # missing is 0
    assert (said["grid"], said["window"]) == ([2, 2], [1, 1])
    assert "not a cause" in said["meaning"]
    # Two channels a pixel: covered together.
    lost = {part["field"]: part["contribution"] for part in both["contributions"]}
    assert lost[SIGNATURE.fields[0].name] == pytest.approx(lost["sex"])


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "grid"),
        ("&grid=8", "grid"),
        ("&grid=3x1", "grid"),
        ("&grid=9999x9999", "grid"),
        ("&grid=0x1", "grid"),
        ("&grid=2x2&window=3x1", "window"),
        ("&grid=2x2&window=x", "window"),
    ],
)
def test_a_size_that_is_none_is_refused(app: App, query: str, field: str) -> None:
    reply = ask(app, "POST", f"/explain?method=occlusion{query}", {"age": 63})

    assert (reply.status, reply.json["field"]) == (422, field)


_STUDY = """
[study]
name = "pictures"
task = "hospital.pictures:TASK"
rounds = 1
[model]
name = "mlp"
[training]
local_steps = 1
sample_rate = 0.3
learning_rate = 0.5
[privacy]
mode = "none"
acknowledge = "no privacy"
"""


def test_a_task_of_pixels_is_published_and_its_picture_occluded(tmp_path: Path) -> None:
    pixels = [
        Field(
            name=f"pixel_{row}_{column}",
            kind="number",
            description="brightness",
            allowed=(0, 255),
            scaling=(0, 255),
            missing_indicator=False,
        )
        for row in range(8)
        for column in range(8)
    ]
    label = Field(name="finding", kind="flag", description="a finding", role="label")
    task = BinaryTabularTask(name="pictures", schema=Schema(fields=(*pixels, label)))
    model = task.model("mlp")
    parameters = np.random.default_rng(3).normal(size=len(to_vector(model))).astype(np.float32)
    folder = publish(
        registry=tmp_path / "registry",
        study=parse_study(_STUDY),
        task=task,
        parameters=parameters,
        fitted=None,
        privacy={"mode": "none", "simulated": True},
        metrics={},
        training={},
        identity=_IDENTITY,
    )
    app = App(Service(Catalogue([start_engine(read_release(folder, _IDENTITY.public))])))
    picture = np.random.default_rng(4).integers(0, 256, 64).tolist()

    (said,) = ask(
        app,
        "POST",
        "/v1/models/pictures:explain?method=occlusion&grid=8x8&window=3x3",
        {"instances": [picture]},
    ).json["explanations"]

    # By torch: the same windows, covered by what is missing, which preparation makes 0.
    from_vector(model, parameters)
    features = (np.array(picture, np.float32) - 127.5) / 127.5
    rows = np.repeat(features[None].reshape(1, 8, 8), 37, axis=0)
    places = [(r, c) for r in range(6) for c in range(6)]
    for row, (r, c) in zip(rows[1:], places, strict=True):
        row[r : r + 3, c : c + 3] = 0
    scores = model(torch.from_numpy(rows.reshape(37, 64))).detach().numpy().ravel()
    corner = next(p for p in said["contributions"] if p["field"] == "pixel_0_0")
    assert corner["contribution"] == pytest.approx(scores[0] - scores[1], abs=2e-3)
    assert len(said["contributions"]) == 64
