"""Partitioners: what every one keeps, and what each is for."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_simulate import model_of

from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError
from fedward.core.simulated import Args
from fedward.simulations.partitions import Partition, data_card, draw_card, make_partition
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks import datasets
from fedward.tasks.registry import get_task

TASK = get_task("heart-disease")
TABLE = datasets.pooled("heart-disease")
LABEL = TASK.schema.label.name


def spread(kind: str, seed: int = 3, **args: str | float) -> Partition:
    given_args: Args = dict(args)
    return make_partition(TABLE, label=LABEL, kind=kind, args=given_args, seed=seed)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["dirichlet", "quantity", "covariate", "temporal"]),
    num_sites=st.integers(2, 60),
    size=st.sampled_from([0, 10, 300]),
    seed=st.integers(0, 5),
)
def test_no_site_has_a_patient_twice_and_none_is_at_two_sites_without_need(
    kind: str, num_sites: int, size: int, seed: int
) -> None:
    args: dict[str, str | float] = {"num_sites": num_sites, "size": size}
    if kind == "covariate":
        args["field"] = "age"

    partition = spread(kind, seed, **args)

    assert len(partition.rows) == num_sites
    for rows in partition.rows.values():
        assert len(set(rows.tolist())) == len(rows) >= 4
    together = np.concatenate(list(partition.rows.values()))
    if size * num_sites <= len(TABLE):
        assert len(set(together.tolist())) == len(together)
    if size and kind != "quantity":
        assert {len(rows) for rows in partition.rows.values()} == {size}
    assert set(together.tolist()) <= set(range(len(TABLE)))


def test_natural_sites_are_the_hospitals() -> None:
    partition = spread("natural")

    assert {n: len(r) for n, r in partition.rows.items()} == datasets.partitions("heart-disease")


def test_small_alpha_skews_labels_and_large_alpha_does_not() -> None:
    labels = TABLE.columns[LABEL]

    def disparity(alpha: float) -> float:
        rows = spread("dirichlet", num_sites=12, alpha=alpha, size=40).rows.values()
        return float(np.std([labels[r].mean() for r in rows]))

    assert disparity(0.1) > 3 * disparity(1000.0)


def test_small_alpha_skews_sizes() -> None:
    sizes = [len(r) for r in spread("quantity", num_sites=12, alpha=0.2).rows.values()]

    assert max(sizes) > 8 * min(sizes)


def test_strength_moves_the_field_from_site_to_site() -> None:
    ages = TABLE.columns["age"]

    def means(strength: float) -> list[float]:
        rows = spread("covariate", num_sites=5, field="age", strength=strength).rows.values()
        return [float(np.nanmean(ages[r])) for r in rows]

    assert means(1.0) == sorted(means(1.0))
    assert np.ptp(means(1.0)) > 4 * np.ptp(means(0.0))


def test_eras_are_consecutive_at_full_strength() -> None:
    rows = list(spread("temporal", num_sites=7, strength=1.0).rows.values())

    np.testing.assert_array_equal(np.concatenate(rows), np.arange(len(TABLE)))


@pytest.mark.parametrize(
    ("kind", "args", "says"),
    [
        ("random", {}, "allowed: natural, dirichlet"),
        ("dirichlet", {"num_sites": 4, "beta": 1.0}, "allowed: num_sites, alpha, size"),
        ("dirichlet", {}, "needs num_sites"),
        ("dirichlet", {"num_sites": 500}, "give size"),
        ("covariate", {"num_sites": 4, "field": "height"}, "allowed: age"),
        ("quantity", {"num_sites": 4, "alpha": -1.0}, "must be positive"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(kind: str, args: Args, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_partition(TABLE, label=LABEL, kind=kind, args=args, seed=1)


def test_the_data_card_counts_every_patient_and_has_a_picture() -> None:
    partition = spread("dirichlet", num_sites=100, size=30)

    card = data_card(partition, TABLE, label=LABEL)

    assert all(sum(site["labels"].values()) == 30 for site in card["sites"].values())
    assert card["overlap"] > 3
    assert draw_card(card).startswith("<svg")


def test_a_site_reads_from_disk_what_it_trained_on_in_memory(tmp_path: Path) -> None:
    from fedward.core.study import load_study
    from fedward.simulations.provision import provision
    from fedward.simulations.scenarios import make_scenario
    from fedward.simulations.sites import open_sites

    extra = '[simulation]\npartition = "quantity"\nargs = { num_sites = 30, size = 60 }\n'
    file = write_study(tmp_path, privacy=NO_PRIVACY, rounds=2, extra=extra)
    run = prepare_run(file, tmp_path / "run")
    study = load_study(file)
    files = provision(run, study, study_file=file).load()

    with open_sites(run, files, make_scenario(study, [])) as sites:
        for path, site in list(sites.items())[:5]:
            memory, disk = site.examples(TASK, study), LocalSite(path).examples(TASK, study)
            for one, other in zip(memory, disk, strict=True):
                np.testing.assert_array_equal(one.features, other.features)
                np.testing.assert_array_equal(one.labels, other.labels)
                np.testing.assert_array_equal(one.units, other.units)


def test_one_run_says_which_engine_it_chose_and_the_other_engine_agrees(tmp_path: Path) -> None:
    models = {}
    for engine in ("auto", "per-site"):
        extra = (
            f'[simulation]\nengine = "{engine}"\npartition = "quantity"\n'
            "args = { num_sites = 12, size = 40 }\n"
        )
        file = write_study(tmp_path / engine, rounds=3, extra=extra)
        run = prepare_run(file, tmp_path / engine / "run")
        simulate(file, run)
        (event,) = [e for e in run.events() if e["event"] == "engine"]
        models[event["engine"]] = np.load(_parameters(run.path))
        assert event["why"]

    np.testing.assert_allclose(models["vectorised"], models["per-site"], rtol=1e-4, atol=1e-5)


def _parameters(run: Path) -> Path:
    from test_simulate import model_of

    from fedward.core.run import RunDirectory

    np.save(run / "model.npy", model_of(RunDirectory.open(run)))
    return run / "model.npy"


@pytest.mark.parametrize("privacy", [NO_PRIVACY, EPSILON_4], ids=["none", "local"])
def test_sites_of_all_sizes_that_take_as_many_steps_as_they_need_train_as_one_batch(
    tmp_path: Path, privacy: str
) -> None:
    runs = []
    for engine in ("per-site", "vectorised"):
        extra = (
            f'[simulation]\nengine = "{engine}"\npartition = "quantity"\n'
            "args = { num_sites = 8, alpha = 2.0 }\n"
        )
        file = write_study(tmp_path / engine, privacy=privacy, rounds=2, extra=extra)
        text = file.read_text().replace("local_steps = 1", "local_epochs = 1")
        file.write_text(text.replace("sample_rate = 0.3", "batch_size = 5"))
        runs.append(prepare_run(file, file.parent / "run"))
        simulate(file, runs[-1])

    alone, together = (model_of(run) for run in runs)
    sizes = json.loads((runs[0].path / "partition.json").read_text())["sites"].values()
    assert len({site["patients"] for site in sizes}) > 4
    assert float(np.linalg.norm(alone)) > 0.1
    np.testing.assert_allclose(together, alone, atol=2e-5 * float(np.linalg.norm(alone)), rtol=0)
