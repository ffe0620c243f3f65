"""Whole runs under secure aggregation: the same models, and the coordinator sees sums alone."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_simulate import SITES, model_of

from fedward.client.answers import train_round
from fedward.client.local_site import LocalSite
from fedward.core.errors import AggregationAborted, ConfigError, UpdateRejected
from fedward.core.identity import Identity
from fedward.core.roster import load_roster, write_roster
from fedward.core.run import RunDirectory
from fedward.core.study import load_study
from fedward.server.channel import FlowerChannel, Reply
from fedward.simulations.provision import provision
from fedward.simulations.simulate import prepare_run, simulate
from fedward.simulations.sites import LocalSites
from fedward.transport.payload import Payload


def secure_study(folder: Path, **study: Any) -> Path:
    file = write_study(folder, **study)
    file.write_text(file.read_text().replace("secure = false", "secure = true"))
    return file


def run_study(file: Path) -> tuple[RunDirectory, dict[str, Any]]:
    run = prepare_run(file, file.parent / "run")
    return run, simulate(file, run)


@pytest.mark.parametrize("privacy", [NO_PRIVACY, EPSILON_4], ids=["none", "local"])
def test_the_model_is_that_of_plain_aggregation(tmp_path: Path, privacy: str) -> None:
    plain, _ = run_study(write_study(tmp_path / "plain", privacy=privacy, rounds=4))

    secure, result = run_study(secure_study(tmp_path / "secure", privacy=privacy, rounds=4))

    np.testing.assert_allclose(model_of(secure), model_of(plain), atol=2e-5, rtol=0)
    cost = result["secure_aggregation"]
    assert cost["bytes_per_site_plain"] == 4 * 4 * len(model_of(secure))
    assert 0 < cost["share_of_rounds"] < 1


class Spy(FlowerChannel):
    """Keeps what a coordinator sees."""

    seen: list[Payload]

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        for reply in super().ask(kind, payloads, round_number=round_number, deadline=deadline):
            if kind in {"train.update", "query.admit"} and reply.payload is not None:
                self.seen.append(reply.payload)
            yield reply


def test_a_coordinator_sees_neither_updates_nor_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward.simulations.simulate.FlowerChannel", Spy)
    Spy.seen = []

    run_study(secure_study(tmp_path, privacy=NO_PRIVACY, rounds=2))

    admissions, rounds = Spy.seen[: len(SITES)], Spy.seen[len(SITES) :]
    assert [payload.record["terms"]["weight"] for payload in admissions] == [None] * 4
    assert [set(payload.arrays) for payload in rounds] == [{"masked"}] * 8
    assert [set(payload.record) for payload in rounds] == [{"site", "round"}] * 8


def test_a_site_may_be_a_new_process_for_each_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = run_study(secure_study(tmp_path / "kept", rounds=3))
    monkeypatch.setattr(LocalSites, "__getitem__", lambda _, file: LocalSite(file))

    forgetful, _ = run_study(secure_study(tmp_path / "forgetful", rounds=3))

    np.testing.assert_array_equal(model_of(forgetful), model_of(kept))


def dropping(monkeypatch: pytest.MonkeyPatch, sites: set[str], kind: str, rounds: set[int]) -> None:
    """Lose the answers of some sites to a kind of message in some rounds."""
    original = FlowerChannel.ask

    def ask(
        channel: FlowerChannel,
        asked: str,
        payloads: Mapping[int, Payload],
        *,
        round_number: int,
        deadline: float,
    ) -> Iterator[Reply]:
        names = dict(zip(channel.node_ids(), SITES, strict=True))
        for reply in original(
            channel, asked, payloads, round_number=round_number, deadline=deadline
        ):
            lost = asked == kind and round_number in rounds and names[reply.node_id] in sites
            yield Reply(reply.node_id, None, "connection lost") if lost else reply

    monkeypatch.setattr(FlowerChannel, "ask", ask)


def test_a_site_that_drops_out_is_left_out_of_the_sum_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping(monkeypatch, {"hungary"}, "train.update", {2})
    plain, _ = run_study(write_study(tmp_path / "plain", privacy=NO_PRIVACY, rounds=4))

    secure, _ = run_study(secure_study(tmp_path / "secure", privacy=NO_PRIVACY, rounds=4))

    counts = [event["sites"] for event in secure.events() if event["event"] == "round"]
    assert counts == [4, 3, 4, 4]
    np.testing.assert_allclose(model_of(secure), model_of(plain), atol=2e-5, rtol=0)


def test_a_share_that_is_lost_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_study(secure_study(tmp_path / "whole", rounds=3))
    dropping(monkeypatch, {"va"}, "train.unmask", {1, 2, 3})

    lost, _ = run_study(secure_study(tmp_path / "lost", rounds=3))

    np.testing.assert_array_equal(model_of(lost), model_of(whole))


def test_below_the_threshold_the_round_is_void_its_price_is_paid_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = secure_study(tmp_path, rounds=4)
    run = prepare_run(file, tmp_path / "run")
    with monkeypatch.context() as patched:
        dropping(patched, {"va", "hungary"}, "train.update", {2})
        with pytest.raises(AggregationAborted, match="round 2 is void"):
            simulate(file, run)

    result = simulate(file, prepare_run(file, tmp_path / "run", resume=True))

    finished = [event["round"] for event in run.events() if event["event"] == "round"]
    assert finished == [1, 3, 4]
    for site in SITES:
        ledger = LocalSite(run.path / "sites" / f"{site}.toml").ledger
        paid = [e.round_number for e in ledger.entries() if e.kind == "reserve"]
        assert paid[:4] == [1, 2, 3, 4]
        assert result["privacy"]["sites"][site]["epsilon"] == pytest.approx(
            ledger.spent(1e-5).epsilon
        )


def test_after_the_run_the_keys_are_gone_and_its_rounds_stay_closed(tmp_path: Path) -> None:
    run, _ = run_study(secure_study(tmp_path, rounds=2))
    site = LocalSite(run.path / "sites" / "va.toml")
    study = load_study(run.path / "study.toml")
    size = len(model_of(run))

    parameters: dict[str, np.ndarray[Any, Any]] = {"parameters": np.zeros(size, np.float32)}
    for arrays in (parameters, parameters | {"secagg": np.zeros(40, np.uint8)}):
        with pytest.raises(UpdateRejected, match="no keys were agreed on"):
            train_round(site, Payload({"hash": study.hash, "round": 2}, arrays))
    kept = json.loads(site.session_file(study).read_text())
    assert kept == {"last_round": 2}


def test_a_site_that_the_roster_does_not_know_is_not_aggregated_with(tmp_path: Path) -> None:
    file = secure_study(tmp_path, rounds=2)
    run = prepare_run(file, tmp_path / "run")
    provision(run, load_study(file), study_file=file)
    roster = load_roster(run.path / "roster.toml")
    roster["va"] = Identity.generate_site().public
    write_roster(run.path / "other.toml", roster)
    for name in ("cleveland", "hungary"):
        site = run.path / "sites" / f"{name}.toml"
        site.write_text(site.read_text().replace("../roster.toml", "../other.toml"))

    with pytest.raises(AggregationAborted):
        simulate(file, run)

    failed = [e for e in run.events() if e["event"] == "failed"]
    assert {event["site"] for event in failed} == {"cleveland", "hungary"}
    assert all("roster" in event["reason"] for event in failed)
    assert not [e for e in run.events() if e["event"] == "round"]


def test_a_strategy_that_must_see_single_updates_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedward.strategies import registry
    from fedward.strategies.fedavg import FedAvg

    class Median(FedAvg):
        @property
        def needs(self) -> Any:
            return "each"

    monkeypatch.setitem(registry.STRATEGIES, "median", Median)
    file = secure_study(tmp_path)
    file.write_text(file.read_text().replace("[strategy]", '[strategy]\nname = "median"'))

    with pytest.raises(ConfigError, match=r"\[strategy\] name.*\[aggregation\] secure = true"):
        run_study(file)


def test_a_site_may_be_two_processes_that_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_study(secure_study(tmp_path / "whole", rounds=3))
    processes: list[dict[Path, LocalSite]] = [{}, {}]
    turn = iter(range(1000))

    def open_in_turn(_: LocalSites, file: Path) -> LocalSite:
        # Not a multiple of the sites, so that each site is now here, now there.
        opened = processes[next(turn) // 3 % 2]
        return opened.setdefault(file, LocalSite(file))

    monkeypatch.setattr(LocalSites, "__getitem__", open_in_turn)

    shared, _ = run_study(secure_study(tmp_path / "shared", rounds=3))

    np.testing.assert_array_equal(model_of(shared), model_of(whole))
