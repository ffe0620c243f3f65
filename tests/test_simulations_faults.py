"""Processes that fail, sites with files of their own, attackers that poison their data."""

import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import EPSILON_4, write_study
from test_simulate import model_of

from fedward.core.errors import LedgerCorrupt, RunError
from fedward.core.simulated import Malicious, SimulationSection
from fedward.privacy.accounting import dp_sgd_event
from fedward.privacy.ledger.simulated import SimulatedLedgers, take_out
from fedward.server.channel import Reply
from fedward.simulations.faults import RetryingChannel
from fedward.simulations.partitions.picture import sites_by_class
from fedward.simulations.scenarios import Scenario
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.task import Examples
from fedward.transport.payload import Payload

STUDY = "a" * 64


class Unreliable:
    """Nodes whose processes fail a number of times before they answer."""

    def __init__(self, fails: Mapping[int, int]) -> None:
        self.left = dict(fails)
        self.asked: list[int] = []

    def node_ids(self) -> list[int]:
        return sorted(self.left)

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        del kind, round_number, deadline
        for node in payloads:
            self.asked.append(node)
            self.left[node] -= 1
            if self.left[node] >= 0:
                yield Reply(node, None, "its process died", lost=True)
            elif node == 9:
                yield Reply(node, None, "the policy of the site says no")
            else:
                yield Reply(node, Payload({"site": str(node)}))


def test_a_node_whose_process_failed_is_asked_again_as_often_as_the_study_says() -> None:
    inner = Unreliable({2: 0, 3: 1, 4: 2, 5: 3, 9: 0})
    events: list[dict[str, Any]] = []
    channel = RetryingChannel(
        inner, retries=2, log=lambda kind, **fields: events.append({"event": kind, **fields})
    )

    asked = dict.fromkeys(inner.node_ids(), Payload({}))
    replies = list(channel.ask("train.update", asked, round_number=7, deadline=1.0))

    assert [reply.node_id for reply in replies] == [2, 3, 4, 5, 9]
    assert [reply.payload is not None for reply in replies] == [True, True, True, False, False]
    # A site that refused is not asked again: it would refuse again.
    assert [inner.asked.count(node) for node in (2, 3, 4, 5, 9)] == [1, 2, 3, 3, 1]
    assert {(e["event"], e["round"]) for e in events} == {("retried", 7)}
    assert [e["node"] for e in events] == ["3", "4", "4", "5", "5"]


def test_durable_gives_every_site_a_ledger_of_its_own_and_the_same_model(tmp_path: Path) -> None:
    models, spent = [], []
    for durable in (False, True):
        folder = tmp_path / str(durable)
        file = write_study(folder, rounds=2, privacy=EPSILON_4)
        run = prepare_run(file, folder / "run")

        metrics = simulate(file, run, durable=durable)

        own = sorted(run.path.glob("state/*/ledger.sqlite"))
        assert len(own) == (len(metrics["privacy"]["sites"]) if durable else 0)
        assert (run.path / "ledgers.sqlite").exists() is not durable
        models.append(model_of(run))
        spent.append({s: v["epsilon"] for s, v in metrics["privacy"]["sites"].items()})
    np.testing.assert_array_equal(models[0], models[1])
    assert spent[0] == spent[1]


@pytest.mark.parametrize("shut", [True, False])
def test_books_in_one_file_are_gone_on_from_whether_it_was_closed_or_not(
    tmp_path: Path, *, shut: bool
) -> None:
    def event(steps: int) -> Any:
        return dp_sgd_event(noise_multiplier=1.1, sample_rate=0.2, steps=steps)

    first = SimulatedLedgers(tmp_path / "ledgers.sqlite")
    for site in ("one", "two"):
        _, ledger = first.open(site)
        ledger.allot(study=STUDY, event=event(10), max_epsilon=50, delta=1e-5, unit="patient")
        for number in range(1, 4):
            reservation = ledger.reserve(study=STUDY, round_number=number, event=event(2))
            ledger.settle(reservation, update_digest=f"{number:064x}")
            first.save()
    heads = {site: first.open(site)[1].head for site in ("one", "two")}
    if shut:
        first.shut()

    again = SimulatedLedgers(tmp_path / "ledgers.sqlite")

    for site in ("one", "two"):
        _, ledger = again.open(site)
        ledger.verify()
        assert ledger.head == heads[site]
        assert ledger.settled_digest(study=STUDY, round_number=2) == f"{2:064x}"
        assert ledger.settled_digest(study=STUDY, round_number=4) is None
        ledger.reserve(study=STUDY, round_number=4, event=event(2))
        assert ledger.unsettled(study=STUDY, round_number=4) is not None
    again.save()
    again.shut()


def test_books_that_another_version_left_are_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "ledgers.sqlite"
    with closing(sqlite3.connect(file)) as database:  # as Fedward 0.1 had it
        database.execute("CREATE TABLE sites (name TEXT PRIMARY KEY, key BLOB NOT NULL) STRICT")
        database.execute("CREATE TABLE entries (site TEXT NOT NULL, seq INTEGER NOT NULL) STRICT")
        database.commit()
    before = file.read_bytes()

    with pytest.raises(RunError, match=r"another version of Fedward .*begin the run anew"):
        SimulatedLedgers(file)
    with pytest.raises(RunError, match="another version"):
        take_out(file, "one", state=tmp_path / "state")

    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["not a database", "an entry cut short", "an unknown kind"])
def test_books_that_make_no_sense_are_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "ledgers.sqlite"
    if damage == "not a database":
        file.write_bytes(b"not a database" * 100)
    else:
        ledgers = SimulatedLedgers(file)
        ledgers.open("one")
        ledgers.save()
        ledgers.shut()
        with closing(sqlite3.connect(file)) as database:
            (page,) = database.execute("SELECT entries FROM pages").fetchone()
            page = page[:-20] if damage == "an entry cut short" else page.replace("genesis", "x")
            database.execute("UPDATE pages SET entries = ?", (page,))
            database.commit()

    with pytest.raises(LedgerCorrupt):
        SimulatedLedgers(file)


def test_a_site_that_flips_labels_trains_on_the_other_class() -> None:
    attack = Malicious(attack="label-flip", sites=("bad",))
    scenario = Scenario(3, SimulationSection(malicious=attack), frozenset({"bad"}))
    labels = np.array([0, 1, 1, 0], np.float32)
    examples = Examples(np.zeros((4, 2), np.float32), labels, np.arange(4))

    np.testing.assert_array_equal(scenario.poison("bad", examples).labels, 1 - labels)
    np.testing.assert_array_equal(scenario.poison("good", examples).labels, labels)


def test_a_partitions_picture_stacks_the_classes_to_scale_and_escapes_names() -> None:
    counts = {"a<b": {"0": 30, "1": 10}, "c": {"0": 5, "1": 0}}

    picture = ET.fromstring(sites_by_class(counts, label="disease"))

    bars = [bar for bar in picture.iter() if bar.tag.endswith("rect")][:4]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.21)
    assert heights[0] == pytest.approx(6 * heights[2], abs=0.36)
    assert heights[3] == 0
    bottoms = [float(bar.attrib["y"]) + float(bar.attrib["height"]) for bar in bars]
    assert bottoms[1] == pytest.approx(float(bars[0].attrib["y"]), abs=0.11)
    assert "a<b" in "".join(picture.itertext())
