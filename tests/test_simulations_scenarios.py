"""Dropouts, stragglers, attackers and crashes, and what a run's report says of them."""

import math
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_simulate import model_of

from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError
from fedward.core.run import RunDirectory
from fedward.core.simulated import Dropout, Malicious, SimulationSection, Stragglers
from fedward.core.study import load_study
from fedward.simulations.attacks import forge
from fedward.simulations.report import write_report
from fedward.simulations.scenarios import Scenario, make_scenario
from fedward.simulations.simulate import prepare_run, simulate

TEN = '[simulation]\npartition = "dirichlet"\nargs = { num_sites = 10, alpha = 5.0 }\n'


def run_with(folder: Path, lines: str, **study: object) -> RunDirectory:
    file = write_study(folder, extra=TEN + lines, **study)  # type: ignore[arg-type] # a test's keywords
    run = prepare_run(file, folder / "run")
    simulate(file, run)
    return run


def rounds_of(run: RunDirectory, kind: str) -> set[tuple[int, str]]:
    return {(e["round"], e["site"]) for e in run.events() if e["event"] == kind}


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    lines = """\
dropout = { kind = "independent", rate = 0.3 }
stragglers = { median = 30.0, spread = 1.0, deadline = 120.0 }
malicious = { attack = "sign-flip", sites = 2 }
crash = 0.05
"""
    return run_with(tmp_path_factory.mktemp("troubled"), lines, rounds=12, privacy=NO_PRIVACY)


def test_a_study_with_every_trouble_ends_and_its_report_says_what_happened_to_whom(
    troubled: RunDirectory,
) -> None:
    page = write_report(troubled).read_text()

    (malicious,) = [e["sites"] for e in troubled.events() if e["event"] == "malicious"]
    assert len(malicious) == 2
    assert "What happened to whom" in page
    for site in malicious:
        assert re.search(rf"<td>{site}</td>.*?<td>sign-flip</td>", page)
    for kind in ("dropped", "late", "attacked"):
        assert rounds_of(troubled, kind)
    assert "virtual seconds" in page
    assert "What went wrong" not in page


def test_who_is_away_is_counted_out_of_the_round(troubled: RunDirectory) -> None:
    away = rounds_of(troubled, "dropped") | rounds_of(troubled, "late")
    away |= rounds_of(troubled, "crashed")

    for event in troubled.events():
        if event["event"] == "round":
            missing = {site for number, site in away if number == event["round"]}
            assert event["sites"] == 10 - len(missing)


def test_a_scenario_is_the_same_every_time(troubled: RunDirectory) -> None:
    study = load_study(troubled.path / "study.toml")
    names = [f"site-{n:02d}" for n in range(1, 11)]

    again = make_scenario(study, names)

    expected = {(r, n) for r in range(1, 13) for n in names if again.dropped(n, r)}
    assert rounds_of(troubled, "dropped") == expected


def test_a_site_that_crashes_in_mid_round_has_paid_for_it(tmp_path: Path) -> None:
    run = run_with(tmp_path, "crash = 0.3\n", rounds=3, privacy=EPSILON_4)

    crashed = rounds_of(run, "crashed")
    assert crashed
    for number, site in crashed:
        ledger = LocalSite(run.path / "sites" / f"{site}.toml").ledger
        assert number in {e.round_number for e in ledger.entries() if e.kind == "reserve"}


def test_a_coordinator_that_crashes_ends_with_the_same_model_and_price(tmp_path: Path) -> None:
    whole = run_with(tmp_path / "whole", "", rounds=4)
    broken = run_with(tmp_path / "broken", "coordinator_crash = 3\n", rounds=4)

    assert [e for e in broken.events() if e["event"] == "coordinator crashed"]
    np.testing.assert_array_equal(model_of(broken), model_of(whole))
    spent = [run.read_json("metrics.json")["privacy"]["sites"] for run in (whole, broken)]
    assert {s: v["epsilon"] for s, v in spent[0].items()} == {
        s: v["epsilon"] for s, v in spent[1].items()
    }


def test_a_planted_backdoor_works_and_is_measured(tmp_path: Path) -> None:
    lines = 'malicious = { attack = "backdoor", sites = 3, scale = 4.0, value = 6.0 }\n'
    run = run_with(tmp_path, lines, rounds=30, privacy=NO_PRIVACY)

    measured = run.read_json("metrics.json")["metrics"]["backdoor"]

    assert measured["success"] > measured["without"] + 0.2


def scenario(**settings: object) -> Scenario:
    return Scenario(5, SimulationSection(**settings))  # type: ignore[arg-type] # a test's keywords


@pytest.mark.parametrize("kind", ["independent", "bursty"])
def test_dropout_has_its_rate(kind: str) -> None:
    happening = scenario(dropout=Dropout.model_validate({"kind": kind, "rate": 0.3}))
    sites, rounds = 400, 40

    away = np.array(
        [[happening.dropped(f"s{s}", r) for r in range(1, rounds + 1)] for s in range(sites)]
    )

    # Spells of 4 rounds make about a seventh as many independent draws.
    draws = sites * rounds / (1 if kind == "independent" else 8)
    assert abs(away.mean() - 0.3) < 6.2 * math.sqrt(0.3 * 0.7 / draws)
    if kind == "bursty":
        spells = [len(list(g)) for row in away for value, g in groupby(row) if value]
        assert 3.0 < float(np.mean(spells)) < 4.3  # cut at both ends of the run


def test_half_of_the_stragglers_are_faster_than_the_median() -> None:
    for distribution in ("lognormal", "pareto", "exponential"):
        happening = scenario(stragglers=Stragglers(distribution=distribution, median=30.0))
        seconds = [happening.seconds(f"s{n}", 1) for n in range(4000)]

        assert abs(np.mean(np.array(seconds) < 30.0) - 0.5) < 6.2 * 0.5 / math.sqrt(4000)


def updates(count: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    return [(1 + 0.3 * rng.normal(size=50)).astype(np.float32) for _ in range(count)]


def test_attacks_are_what_their_papers_say() -> None:
    honest = updates(8)
    own, mean = honest[0], np.mean(honest, axis=0)
    widest = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)

    flip = SimulationSection(malicious=Malicious(attack="sign-flip", scale=2.0))
    flipped = Scenario(1, flip, frozenset({"bad"})).outgoing("bad", own)
    ipm = forge(Malicious(attack="ipm", scale=0.5), own, honest, attackers=2)
    hidden = forge(Malicious(attack="min-max"), own, honest, attackers=2)
    alie = forge(Malicious(attack="alie"), own, honest, attackers=2)

    np.testing.assert_allclose(flipped, -2 * own, rtol=1e-6)
    assert float(ipm @ mean) < 0
    farthest = max(float(np.linalg.norm(hidden - h)) for h in honest)
    assert widest * 0.99 < farthest <= widest * 1.0001
    deviations = (mean - alie) / np.std(honest, axis=0)
    assert np.all(deviations >= -1e-3)
    assert np.ptp(deviations) < 1e-3


def test_a_scenario_that_names_a_site_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no site nowhere"):
        run_with(tmp_path, 'malicious = { attack = "ipm", sites = ["nowhere"] }\n')
