"""What a run's log says of its sites: to a terminal, in the report, and by round."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from studies import NO_PRIVACY, write_study
from test_simulations_scenarios import run_with

from fedward.core.run import RunDirectory
from fedward.simulations.happenings import Happened, in_html, in_lines
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, simulate

Events = list[dict[str, Any]]


def event(kind: str, number: int = 0, site: str = "", **more: Any) -> dict[str, Any]:
    return {"time": f"{number}", "event": kind, "round": number, "site": site, **more}


@pytest.fixture
def log() -> Events:
    """Three sites; round 2 is void once, for two of them are away."""
    return [
        event("malicious", sites=["c"], attack="alie"),
        *(event("admitted", site=site) for site in ("a", "b<", "c")),
        event("late", 1, "a", reason="slow"),
        event("attacked", 1, "c", reason="alie"),
        event("round", 1),
        event("dropped", 2, "a", reason="gone"),
        event("dropped", 2, "b<", reason="gone"),
        event("aborted", 2, reason="round 2 is void"),
        event("void", 2, reason="2 sites did not answer, 2 are needed"),
        event("dropped", 2, "a", reason="gone"),
        event("failed", 2, "a", reason="dropped: gone"),
        event("failed", 2, "c", reason="its update is not finite"),
        event("round", 2),
        event("waited", 2, virtual_seconds=33.0),
    ]


def test_a_round_that_was_tried_again_shows_how_it_ended_and_who_was_never_there(
    log: Events,
) -> None:
    happened = Happened.of(log)

    assert happened.rounds == {"a": {"late": [1], "dropped": [2]}, "b<": {"dropped": [2]},
                               "c": {"attacked": [1]}}  # fmt: skip
    assert happened.at_last == {("a", 1): "late", ("c", 1): "attacked", ("a", 2): "dropped"}
    assert happened.away == {"a": [2]}


def test_only_failures_that_were_not_to_happen_are_troubles(log: Events) -> None:
    happened = Happened.of(log)

    left = [e for e in log if e["event"] in {"failed", "aborted"} and not happened.explains(e)]

    assert [(e["event"], e["site"]) for e in left] == [("failed", "c")]


def test_the_terminal_is_told_in_a_line_a_kind(log: Events) -> None:
    assert in_lines(Happened.of(log)) == [
        "away: 2 times, 2 sites, a most often (1 rounds)",
        "too late: 1 times, a",
        "alie attack: 1 times, c",
        "void: 1 times, for lack of sites, in rounds 2",
        "waited: 33 virtual seconds, of which nobody waited",
    ]
    assert in_lines(Happened.of(log[1:4])) == []


def test_the_terminal_is_told_who_did_not_take_the_release(log: Events) -> None:
    refused = [event("release not accepted", site=site, reason=f"{site} says no") for site in "ac"]

    assert in_lines(Happened.of([*log, *refused]))[-2:] == [
        "release not taken by 2 of 3 sites; a: a says no",
        "waited: 33 virtual seconds, of which nobody waited",
    ]


def test_a_round_that_was_open_when_the_run_stopped_is_told(log: Events) -> None:
    rounds = [event("opened", 1), event("round", 1), event("opened", 2), event("opened", 3)]
    going_on = Happened.of(rounds)
    void = Happened.of([*rounds, event("void", 2, reason="too few")])

    lost = "lost: rounds 2, open when the run stopped; a secure sum is not asked for twice, and"
    assert [line[: len(lost)] for line in in_lines(going_on)] == [lost]
    assert "Lost: rounds 2, open" in in_html(going_on)
    assert (void.lost, Happened.of(log).lost) == ((), ())


def test_the_picture_has_a_cell_for_each_site_and_round(log: Events) -> None:
    page = in_html(Happened.of(log))

    picture = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    cells = [
        "".join(cell.itertext())
        for cell in picture.iter()
        if cell.tag.endswith("rect") and "".join(cell.itertext())
    ]
    assert cells == [
        "a, round 1: late",
        "a, round 2: dropped",
        "b<, round 1: answered",
        "b<, round 2: answered",
        "c, round 1: attacked",
        "c, round 2: answered",
    ]
    assert "Round 2 was void: 2 sites did not answer" in page
    assert "<td>b<" not in page
    assert in_html(Happened.of([])) == ""


def test_the_curve_is_the_exact_metrics_of_each_rounds_model(tmp_path: Path) -> None:
    run = run_with(tmp_path, "evaluate_every = 2\n", rounds=5, privacy=NO_PRIVACY)
    whole = run_with(tmp_path / "whole", "", rounds=5, privacy=NO_PRIVACY)
    metrics = run.read_json("metrics.json")

    curve = metrics["curve"]

    assert [point["round"] for point in curve] == [0, 2, 4, 5]
    assert curve[0]["auroc"] == pytest.approx(0.5)
    assert curve[-1]["num_examples"] == metrics["metrics"]["pooled"]["num_examples"]
    assert curve[-1]["auroc"] > 0.8
    # Looking changes nothing.
    assert metrics["metrics"] == whole.read_json("metrics.json")["metrics"]
    assert "Learning" in write_report(run).read_text()
    assert "Learning" not in write_report(whole).read_text()


def test_a_report_of_many_hospitals_is_short(tmp_path: Path) -> None:
    extra = '[simulation]\npartition = "dirichlet"\nargs = { num_sites = 40, alpha = 5.0 }\n'
    file = write_study(tmp_path, rounds=1, extra=extra)
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)

    page = write_report(run).read_text()

    assert page.count("<details><summary>40 hospitals</summary>") == 2
    assert "Quality of the hospitals" in page
    assert "Patients of each hospital" in page


def test_the_hospitals_as_they_are_have_a_card_and_a_picture(tmp_path: Path) -> None:
    file = write_study(tmp_path, rounds=1, extra='[simulation]\nleave_out = ["va"]\n')
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)

    card = json.loads((run.path / "partition.json").read_text())
    sizes = {site: values["patients"] for site, values in card["sites"].items()}

    assert sizes == {"cleveland": 303, "hungary": 294, "switzerland": 123}
    assert all(sum(v["labels"].values()) == v["patients"] for v in card["sites"].values())
    assert ET.fromstring((run.path / "partition.svg").read_text()).tag.endswith("svg")
    # All that says what it takes to repeat the run says that it was simulated.
    assert run.read_json("manifest.json")["simulated"] is True
    training = json.loads((run.path / "release" / "training.json").read_text())
    assert training["manifest"]["simulated"] is True


def test_an_epsilon_never_falls_in_the_reports_picture(tmp_path: Path) -> None:
    from fedward.simulations.report import _epsilon_curves

    run = run_with(tmp_path, "dropout = { rate = 0.4 }\n", rounds=8)
    privacy = run.read_json("metrics.json")["privacy"]

    rounds, curves = _epsilon_curves(RunDirectory.open(run.path), privacy)

    assert rounds == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    for site, curve in curves.items():
        assert curve == sorted(curve)
        assert curve[-2] == pytest.approx(privacy["sites"][site]["epsilon"])
    assert len({curve[-1] for curve in curves.values()}) > 1
