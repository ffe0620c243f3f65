"""Adaptive clipping of a study, from its file to what is released."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from studies import EPSILON_4, NO_PRIVACY, change, write_study
from torch import nn

from fedward.client.clipping import ClipNorms
from fedward.client.local_site import Admitted, LocalSite
from fedward.client.plan import adaptive_clipping, plan_site, training_plan
from fedward.client.training import Private
from fedward.core.errors import AdmissionRefused, ConfigError
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study, parse_study
from fedward.privacy.accounting import compose, gaussian_event, privacy_spent
from fedward.privacy.accounting.events import leaves
from fedward.privacy.mechanisms import add_noise, simulated_source
from fedward.simulations.engines import choose_engine
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.registry import get_task

Vector = NDArray[np.float64]
# Of the study of `studies.py`, before a study could say how it clips.
HASH_BEFORE = "42c75c0b604c13f8592ccb7104642ea6b8751b1c51cfba47a0de5375047947f6"
ROUNDS, STEPS, RATE, START = 3, 4, 0.5, 0.05
ADAPTIVE = EPSILON_4.replace("clip_norm = 1.0", f"clip_norm = {START}") + '\nclipping = "adaptive"'


def adaptive_study(folder: Path, *, privacy: str = ADAPTIVE, extra: str = "") -> Path:
    return change(
        write_study(folder, privacy=privacy, rounds=ROUNDS, extra=extra),
        ("learning_rate = 1.0", f"learning_rate = {RATE}"),
        ("local_steps = 1", f"local_steps = {STEPS}"),
        ("sample_rate = 0.3", "sample_rate = 1.0"),
    )


def opened(run: RunDirectory) -> tuple[Study, list[LocalSite]]:
    files = sorted((run.path / "sites").glob("*.toml"))
    return load_study(run.path / "study.toml"), [LocalSite(file) for file in files]


def by_hand(study: Study, sites: list[LocalSite]) -> tuple[Vector, dict[str, float]]:
    """Andrew et al. 2021, algorithm 1, at each site, whose own clip norm goes from round to round.

    The same draws as a site's, in the order that `train` promises; the arithmetic is apart.
    """
    task = get_task(study.study.task)
    norms = dict.fromkeys((site.name for site in sites), START)
    sizes = [s.site.data.public_size * (1 - s.site.data.held_out) for s in sites]
    model, kept = np.zeros(28), []
    for number in range(1, ROUNDS + 1):
        locals_ = []
        for site, size in zip(sites, sizes, strict=True):
            examples, _ = site.examples(task, study)
            z = plan_site(study, site.site).noise_multiplier
            count_noise = max(size / 20, 2 * z)
            both = (z**-2 - (2 * count_noise) ** -2) ** -0.5
            source = simulated_source(*site.seed(study, "train", number))
            x = np.column_stack([examples.features, np.ones(len(examples.labels))])
            local, clip = model.copy(), norms[site.name]
            for _ in range(STEPS):
                source.uniform(len(x))
                error = 1 / (1 + np.exp(-x @ local)) - examples.labels
                gradients = x * error[:, None]
                lengths = np.linalg.norm(gradients, axis=1)
                clipped = gradients * np.minimum(1, clip / lengths)[:, None]
                summed = clipped.sum(axis=0).astype(np.float32)
                noisy = add_noise(summed, std=both * clip, sensitivity=clip, source=source)
                within = np.array([(lengths <= clip).sum() - len(x) / 2])
                counted = add_noise(within, std=count_noise, sensitivity=0.5, source=source)
                share = float(counted[0]) / size + 0.5
                local = local - RATE * noisy.astype(np.float64) / size
                clip *= math.exp(-0.2 * (share - 0.5))
            norms[site.name] = clip
            locals_.append(local)
        model = np.average(locals_, axis=0, weights=sizes)
        kept.append(model)
    return np.asarray(np.mean(kept[ROUNDS // 2 :], axis=0), dtype=np.float64), norms


def released(run: RunDirectory) -> Vector:
    arrays = load_file(run.path / "release" / "model.safetensors")
    (weight,) = (value for name, value in arrays.items() if name.endswith("weight"))
    (bias,) = (value for name, value in arrays.items() if name.endswith("bias"))
    return np.append(weight.ravel(), bias.ravel()).astype(np.float64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any]]:
    file = adaptive_study(tmp_path_factory.mktemp("adaptive"))
    run = prepare_run(file, file.parent / "run")
    return run, simulate(file, run)


@pytest.mark.parametrize("durable", [False, True])
def test_a_run_is_what_it_is_by_hand(
    finished: tuple[RunDirectory, dict[str, Any]], tmp_path: Path, durable: bool
) -> None:
    run, _ = finished
    if durable:
        file = adaptive_study(tmp_path)
        run = prepare_run(file, tmp_path / "run")
        simulate(file, run, durable=True)
    study, sites = opened(run)

    model, norms = by_hand(study, sites)

    np.testing.assert_allclose(released(run), model, rtol=0, atol=2e-5)
    for site in sites:
        kept = ClipNorms(site.state / "clipping" / f"{study.hash}.json", durable=False)
        assert kept.before(ROUNDS + 1) == pytest.approx(norms[site.name], rel=1e-4)
        assert norms[site.name] > 1.2 * START


def test_gradients_and_counts_are_billed_as_one(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, result = finished
    study, sites = opened(run)

    for site in sites:
        plan = plan_site(study, site.site)
        guarantee = training_plan(study, plan, round_number=1).guarantee
        adaptive = adaptive_clipping(study, plan)
        assert adaptive is not None
        assert isinstance(guarantee, Private)
        # What was released in a step: gradients, and a count that a patient moves by half.
        released_twice = [
            gaussian_event(guarantee.gradient_noise_multiplier),
            gaussian_event(adaptive.count_noise / 0.5),
        ]
        said = result["privacy"]["sites"][site.name]
        spent = privacy_spent(
            compose(released_twice * (STEPS * ROUNDS)), delta=1e-5, unit="patient"
        )
        assert said["epsilon"] == pytest.approx(spent.epsilon, abs=2e-3)
        assert said["epsilon"] <= 4.0
        reserved = [leaves(e.event) for e in site.ledger.entries() if e.kind == "reserve"]
        assert reserved[0] == leaves(compose([gaussian_event(plan.noise_multiplier)] * STEPS))


def test_the_release_says_that_clip_norms_move(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, _ = finished
    statement = json.loads((run.path / "release" / "privacy.json").read_text())

    assert statement["clipping"] == "adaptive"
    assert "quantile" in statement["mechanism"]


def test_a_run_that_is_taken_up_again_ends_as_if_it_had_not_stopped(
    finished: tuple[RunDirectory, dict[str, Any]], tmp_path: Path
) -> None:
    extra = "\n[simulation]\ncoordinator_crash = 2\n"
    file = adaptive_study(tmp_path, extra=extra)
    run = prepare_run(file, tmp_path / "run")

    simulate(file, run)

    crashes = [event["event"] for event in run.events() if "crash" in event["event"]]
    assert crashes
    np.testing.assert_array_equal(released(run), released(finished[0]))


def test_a_round_that_is_trained_again_starts_where_it_started_before(tmp_path: Path) -> None:
    norms = ClipNorms(tmp_path / "norms.json", durable=True)

    assert norms.before(1) is None
    for number, norm in enumerate((0.5, 0.25, 0.125), start=1):
        norms.keep(number, norm)
    assert norms.before(3) == 0.25
    norms.keep(2, 0.75)
    assert (norms.before(2), norms.before(3), norms.before(9)) == (0.5, 0.75, 0.75)


def test_a_site_that_missed_rounds_goes_on_from_the_last_that_it_was_in(tmp_path: Path) -> None:
    file = adaptive_study(tmp_path)
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    study, sites = opened(run)
    site = sites[0]
    admitted = Admitted(study, plan_site(study, site.site))
    newest = ClipNorms(site.state / "clipping" / f"{study.hash}.json", durable=False).before(99)

    plan = site.round_plan(admitted, ROUNDS + 5)

    assert isinstance(plan.guarantee, Private)
    assert plan.guarantee.first_clip_norm == newest


@pytest.mark.parametrize(
    ("privacy", "says"),
    [
        (ADAPTIVE.replace("local", "distributed"), 'choose mode = "local"'),
        (NO_PRIVACY + '\nclipping = "adaptive"', "clips nothing"),
        (EPSILON_4 + "\nclip_quantile = 0.3", 'clip_quantile belongs to clipping = "adaptive"'),
        (ADAPTIVE + "\nclip_quantile = 1.0", "clip_quantile"),
    ],
)
def test_where_it_is_not_sound_it_is_refused(tmp_path: Path, privacy: str, says: str) -> None:
    text = write_study(tmp_path, privacy=privacy).read_text()

    with pytest.raises(ConfigError, match=says):
        parse_study(text)


def test_a_count_with_too_little_noise_is_refused_by_the_site(
    finished: tuple[RunDirectory, dict[str, Any]], tmp_path: Path
) -> None:
    _, sites = opened(finished[0])
    study = load_study(adaptive_study(tmp_path, privacy=ADAPTIVE + "\nclip_count_noise = 0.5"))

    with pytest.raises(AdmissionRefused, match="leaves nothing for the gradients"):
        plan_site(study, sites[0].site)


def test_the_keys_reach_the_trainer(
    finished: tuple[RunDirectory, dict[str, Any]], tmp_path: Path
) -> None:
    _, sites = opened(finished[0])
    more = "\nclip_quantile = 0.7\nclip_learning_rate = 0.1\nclip_count_noise = 50.0"
    study = load_study(adaptive_study(tmp_path, privacy=ADAPTIVE + more))

    found = adaptive_clipping(study, plan_site(study, sites[0].site))

    assert found is not None
    assert (found.quantile, found.learning_rate, found.count_noise) == (0.7, 0.1, 50.0)


def test_the_vectorised_engine_is_not_chosen(tmp_path: Path) -> None:
    by_itself = load_study(adaptive_study(tmp_path / "a"))
    forced = load_study(
        adaptive_study(tmp_path / "b", extra='\n[simulation]\nengine = "vectorised"\n')
    )

    assert choose_engine(by_itself, nn.Linear(5, 1), sites=100).engine == "per-site"
    with pytest.raises(ConfigError, match="clipping"):
        choose_engine(forced, nn.Linear(5, 1), sites=100)


def test_fixed_clipping_is_hashed_as_before_there_was_another(tmp_path: Path) -> None:
    silent = load_study(write_study(tmp_path / "silent"))
    spoken = load_study(write_study(tmp_path / "b", privacy=EPSILON_4 + '\nclipping = "fixed"'))

    assert spoken.hash == silent.hash == HASH_BEFORE
