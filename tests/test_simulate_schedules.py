"""Schedules and averages of a study, from its file to what is released."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from studies import EPSILON_4, NO_PRIVACY, change, write_study
from torch import nn

from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError
from fedward.core.study import Study, load_study
from fedward.privacy.accounting.events import leaves
from fedward.simulations.engines import choose_engine
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.registry import get_task

Vector = NDArray[np.float64]

ROUNDS, STEPS, RATE = 4, 3, 0.8


def study_file(
    folder: Path, *, schedule: str, averaging: str, privacy: str = NO_PRIVACY, extra: str = ""
) -> Path:
    return change(
        write_study(folder, privacy=privacy, rounds=ROUNDS, extra=extra),
        ("learning_rate = 1.0", f'learning_rate = {RATE}\nmomentum = 0.5\nschedule = "{schedule}"'),
        ("local_steps = 1", f'local_steps = {STEPS}\naveraging = "{averaging}"'),
        ("sample_rate = 0.3", "sample_rate = 1.0"),
    )


def by_hand(study: Study, sites: list[LocalSite], *, schedule: str, averaging: str) -> Vector:
    """Federated averaging of logistic regressions, everybody in every step."""
    task = get_task(study.study.task)
    rows = [site.examples(task, study)[0] for site in sites]
    weights = [s.site.data.public_size * (1 - s.site.data.held_out) for s in sites]
    model = np.zeros(rows[0].features.shape[1] + 1)
    kept = []
    for number in range(ROUNDS):
        locals_ = []
        for examples, weight in zip(rows, weights, strict=True):
            x = np.column_stack([examples.features, np.ones(len(examples.labels))])
            local, velocity, iterates, moving = model.copy(), np.zeros_like(model), [], 0 * model
            for step in range(STEPS):
                done = (number * STEPS + step) / (ROUNDS * STEPS)
                rate = (
                    RATE
                    * {
                        "constant": 1.0,
                        "linear": 1 - done,
                        "cosine": (1 + math.cos(math.pi * done)) / 2,
                    }[schedule]
                )
                error = 1 / (1 + np.exp(-x @ local)) - examples.labels
                velocity = 0.5 * velocity + x.T @ error / weight
                local = local - rate * velocity
                iterates.append(local)
                moving = 0.99 * moving + 0.01 * local
            given = {
                "last": iterates[-1],
                "tail": np.mean(iterates[STEPS // 2 :], axis=0),
                "ema": moving / (1 - 0.99**STEPS),
            }[averaging]
            locals_.append(given)
        model = np.average(locals_, axis=0, weights=weights)
        kept.append(model)
    return np.asarray(np.mean(kept[ROUNDS // 2 :], axis=0), dtype=np.float64)


@pytest.mark.parametrize(
    ("schedule", "averaging"), [("linear", "last"), ("cosine", "tail"), ("constant", "ema")]
)
def test_a_run_with_a_schedule_and_an_average_is_what_it_is_by_hand(
    tmp_path: Path, schedule: str, averaging: str
) -> None:
    file = study_file(tmp_path, schedule=schedule, averaging=averaging)
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    released = load_file(run.path / "release" / "model.safetensors")
    study = load_study(file)
    sites = [LocalSite(path) for path in sorted((run.path / "sites").glob("*.toml"))]

    expected = by_hand(study, sites, schedule=schedule, averaging=averaging)

    (weight,) = (value for name, value in released.items() if name.endswith("weight"))
    (bias,) = (value for name, value in released.items() if name.endswith("bias"))
    found = np.append(weight.ravel(), bias.ravel())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_schedule_changes_what_a_site_agrees_to_and_not_what_it_is_charged(
    tmp_path: Path,
) -> None:
    reserved, hashes = [], set()
    for schedule, averaging in (("constant", "last"), ("cosine", "tail")):
        folder = tmp_path / schedule
        file = study_file(folder, schedule=schedule, averaging=averaging, privacy=EPSILON_4)
        run = prepare_run(file, folder / "run")
        simulate(file, run)
        hashes.add(load_study(file).hash)
        ledger = LocalSite(run.path / "sites" / "va.toml").ledger
        reserved.append([leaves(e.event) for e in ledger.entries() if e.kind == "reserve"])

    assert len(hashes) == 2
    assert reserved[0] == reserved[1]
    assert len(reserved[0]) >= ROUNDS


def test_what_is_constant_is_hashed_as_before_there_were_schedules(tmp_path: Path) -> None:
    silent = load_study(write_study(tmp_path / "silent"))
    spoken = write_study(tmp_path / "spoken")
    spoken.write_text(
        spoken.read_text().replace(
            "[strategy]", 'schedule = "constant"\naveraging = "last"\n[strategy]'
        )
    )

    assert load_study(spoken).hash == silent.hash
    assert not {"schedule", "averaging"} & set(silent.agreed()["training"])


@pytest.mark.parametrize(("schedule", "averaging"), [("linear", "last"), ("constant", "ema")])
def test_the_vectorised_engine_is_not_chosen_for_them(
    tmp_path: Path, schedule: str, averaging: str
) -> None:
    model = nn.Linear(5, 1)
    by_itself = load_study(study_file(tmp_path / "a", schedule=schedule, averaging=averaging))
    forced = load_study(
        study_file(
            tmp_path / "b",
            schedule=schedule,
            averaging=averaging,
            extra='\n[simulation]\nengine = "vectorised"\n',
        )
    )

    assert choose_engine(by_itself, model, sites=100).engine == "per-site"
    with pytest.raises(ConfigError, match="schedule"):
        choose_engine(forced, model, sites=100)
