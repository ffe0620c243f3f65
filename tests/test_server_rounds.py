"""The round loop against sites that are a few lines each, over a channel that is a dictionary."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.core.canonical import canonical_json
from fedward.core.errors import AggregationAborted, ConfigError
from fedward.core.identity import Identity
from fedward.core.run import RunDirectory, manifest
from fedward.core.study import Study, parse_study
from fedward.server.channel import Reply
from fedward.server.rounds import Settings, coordinate
from fedward.tasks.heart_disease import HEART_DISEASE
from fedward.transport.payload import Payload

PUBLISHER = Identity.generate_publisher()
SIZE = sum(p.numel() for p in HEART_DISEASE.model("logistic").parameters())


def study_of(rounds: int = 6, *, min_sites: int = 2, extra: str = "") -> Study:
    return parse_study(
        f"""
        [study]
        name = "loop"
        task = "heart-disease"
        rounds = {rounds}
        [model]
        name = "logistic"
        [training]
        local_steps = 1
        sample_rate = 1
        learning_rate = 1
        [strategy]
        average_last = 0.5
        [privacy]
        mode = "none"
        acknowledge = "no privacy"
        [aggregation]
        secure = false
        min_sites = {min_sites}
        {extra}
        """
    )


@dataclass
class ASite:
    """Moves the model halfway to its own target."""

    name: str
    target: float
    weight: float = 10.0
    identity: Identity = field(default_factory=Identity.generate_site)
    bends: Callable[[str, dict[str, Any]], None] = lambda _kind, _record: None
    update: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None = None
    trained: int = 0

    def answer(self, kind: str, payload: Payload) -> Payload:
        record: dict[str, Any]
        arrays: dict[str, Any] = {}
        if kind == "query.admit":
            record = {"terms": self.terms(str(payload.record["hash"]))}
            record["signature"] = self.identity.sign(canonical_json(record["terms"])).hex()
        elif kind == "train.update":
            self.trained += 1
            record = {"site": self.name, "round": payload.record["round"]}
            step = ((self.target - payload.arrays["parameters"]) / 2).astype(np.float32)
            arrays = {"update": step if self.update is None else self.update(step)}
        elif kind == "evaluate.metrics":
            record = {"site": self.name, "privacy": {"private": False}}
            import torch

            arrays = dict(HEART_DISEASE.metrics(torch.zeros(4, 1), torch.tensor([0.0, 1, 0, 1])))
        else:
            record = {"site": self.name, "version": 1}
        self.bends(kind, record)
        return Payload(record, arrays)

    def terms(self, study_hash: str) -> dict[str, Any]:
        return {
            "site": self.name,
            "key": self.identity.public.pem().decode(),
            "hash": study_hash,
            "weight": self.weight,
            "simulated": True,
        }


class Wire:
    """A channel that calls sites directly."""

    def __init__(self, *sites: ASite, kill_in_round: int | None = None) -> None:
        self.sites = dict(enumerate(sites, start=2))
        self.kill_in_round = kill_in_round

    def node_ids(self) -> list[int]:
        return list(self.sites)

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        del deadline
        if round_number == self.kill_in_round:
            raise KeyboardInterrupt
        for node, payload in payloads.items():
            try:
                answer = self.sites[node].answer(kind, payload)
            except OSError as error:
                yield Reply(node, None, str(error))
            else:
                yield Reply(node, answer)


def run_of(folder: Path, study: Study) -> RunDirectory:
    run = RunDirectory.create(folder, study_text="unused by the loop")
    run.write_json("manifest.json", manifest(study, data={}, runtime="test"))
    return run


def go(wire: Wire, study: Study, run: RunDirectory) -> dict[str, Any]:
    settings = Settings(registry=run.path / "registry", sites=len(wire.sites), patience=0)
    return coordinate(wire, study, run, settings=settings, publisher=PUBLISHER)


def model_after(run: RunDirectory) -> str:
    return [str(e["parameters"]) for e in run.events() if e["event"] == "round"][-1]


def reasons(run: RunDirectory, kind: str) -> list[str]:
    return [event["reason"] for event in run.events() if event["event"] == kind]


def test_the_model_goes_to_the_weighted_mean_of_the_sites(tmp_path: Path) -> None:
    study = study_of(40)
    run = run_of(tmp_path / "run", study)
    go(Wire(ASite("a", 1.0, weight=30), ASite("b", -1.0, weight=10)), study, run)

    from fedward.server.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(run.path / "checkpoints", study_hash=study.hash)

    assert checkpoint is not None
    np.testing.assert_allclose(checkpoint.state.parameters, np.full(SIZE, 0.5), atol=1e-6)
    assert len(list((run.path / "checkpoints").iterdir())) == 2


def test_a_run_that_was_killed_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    study = study_of(9)
    whole, broken = run_of(tmp_path / "whole", study), run_of(tmp_path / "broken", study)
    sites = [ASite("a", 1.0, weight=3), ASite("b", -2.0), ASite("c", 0.3)]
    go(Wire(*sites), study, whole)

    with pytest.raises(KeyboardInterrupt):
        go(Wire(*sites, kill_in_round=6), study, broken)
    trained = sites[0].trained
    result = go(Wire(*sites), study, broken)

    assert sites[0].trained - trained == 4
    assert model_after(broken) == model_after(whole)
    released = [(run.path / "release" / "model.safetensors") for run in (whole, broken)]
    assert released[0].read_bytes() == released[1].read_bytes()
    assert result["metrics"]["pooled"]["num_examples"] == 12


def test_a_round_below_the_threshold_is_void_and_the_run_can_go_on(tmp_path: Path) -> None:
    study = study_of(3)
    run = run_of(tmp_path / "run", study)
    sites = [ASite("a", 1.0), ASite("b", 0.0)]
    sick = [sites[0], ASite("b", 0.0, identity=sites[1].identity, bends=_fails_in_round(2))]

    with pytest.raises(AggregationAborted, match=r"round 2 is void: b did not answer.*2 sites"):
        go(Wire(*sick), study, run)
    go(Wire(*sites), study, run)

    assert [e["round"] for e in run.events() if e["event"] == "round"] == [1, 2, 3]


def test_of_a_thousand_missing_sites_some_are_named() -> None:
    missing = [f"site-{number:04}" for number in range(1000)]

    error = AggregationAborted(round_number=2, missing=missing, threshold=3)

    assert "site-0010, site-0011 and 988 more did not answer" in str(error)
    assert error.missing == tuple(missing)


def _fails_in_round(number: int) -> Callable[[str, dict[str, Any]], None]:
    def bend(_kind: str, record: dict[str, Any]) -> None:
        if record.get("round") == number:
            raise OSError("connection lost")

    return bend


def _answers(**changes: Any) -> Callable[[str, dict[str, Any]], None]:
    def bend(kind: str, record: dict[str, Any]) -> None:
        if kind == "train.update":
            record.update(changes)

    return bend


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"bends": _answers(site="a")}, "another site"),
        ({"bends": _answers(round=99)}, "another round"),
        ({"update": lambda step: step[:-1]}, "shape"),
        ({"update": lambda step: step.astype(np.float64)}, "type"),
        ({"update": lambda step: step * np.float32("nan")}, "not finite"),
    ],
)
def test_an_update_that_cannot_be_used_is_left_out(
    tmp_path: Path, lie: dict[str, Any], reason: str
) -> None:
    study = study_of(2)
    honest, lying = run_of(tmp_path / "honest", study), run_of(tmp_path / "lying", study)
    sites = [ASite("a", 1.0), ASite("b", 2.0)]
    go(Wire(*sites), study, honest)

    go(Wire(*sites, ASite("c", 1e6, **lie)), study, lying)

    assert model_after(lying) == model_after(honest)
    assert len(reasons(lying, "failed")) == 2
    assert all(reason in said for said in reasons(lying, "failed"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": -5}, "not allowed"),
        ({"weight": "heavy"}, "malformed"),
        ({"hash": "0" * 64}, "another study"),
        ({"site": "../etc"}, "not allowed"),
    ],
)
def test_an_admission_that_is_not_in_order_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    class Odd(ASite):
        def terms(self, study_hash: str) -> dict[str, Any]:
            return super().terms(study_hash) | change

    study = study_of(1)
    run = run_of(tmp_path / "run", study)

    go(Wire(ASite("a", 1.0), ASite("b", 1.0), Odd("c", 1.0)), study, run)

    assert [reason in said for said in reasons(run, "refused")] == [True]


def test_a_signature_by_another_key_is_refused(tmp_path: Path) -> None:
    study = study_of(1)
    run = run_of(tmp_path / "run", study)
    thief = ASite("c", 1.0)

    def forge(kind: str, record: dict[str, Any]) -> None:
        if kind == "query.admit":
            record["signature"] = Identity.generate_site().sign(b"x").hex()

    thief.bends = forge
    go(Wire(ASite("a", 1.0), ASite("b", 1.0), thief), study, run)

    assert ["does not verify" in said for said in reasons(run, "refused")] == [True]


def test_two_nodes_cannot_share_a_name(tmp_path: Path) -> None:
    study = study_of(1)
    run = run_of(tmp_path / "run", study)

    go(Wire(ASite("a", 1.0), ASite("b", 1.0), ASite("a", 9.0)), study, run)

    assert reasons(run, "refused") == ["two nodes claim this name"]


def test_too_few_sites_never_start(tmp_path: Path) -> None:
    study = study_of(1, min_sites=3)
    run = run_of(tmp_path / "run", study)
    sites = [ASite("a", 1.0), ASite("b", 1.0)]

    with pytest.raises(AggregationAborted, match="at least 3 sites"):
        go(Wire(*sites), study, run)

    assert [site.trained for site in sites] == [0, 0]


def test_a_study_that_cannot_be_run_sends_nothing(tmp_path: Path) -> None:
    study = study_of(1).model_copy(
        update={"strategy": study_of().strategy.model_copy(update={"name": "unknown"})}
    )
    run = run_of(tmp_path / "run", study)
    site = ASite("a", 1.0, bends=_answers())

    with pytest.raises(ConfigError, match=r"\[strategy\] name"):
        go(Wire(site, ASite("b", 1.0)), study, run)

    assert list(run.events()) == []


def test_a_model_that_cannot_be_published_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    named = {"task": "odd_tasks:CONVOLUTIONAL"}
    study = study_of(1)
    study = study.model_copy(update={"study": study.study.model_copy(update=named)})
    run = run_of(tmp_path / "run", study)
    sites = ASite("a", 1.0), ASite("b", 1.0)

    with pytest.raises(ConfigError, match=r"\[model\] name .* and not published: no ONNX form of"):
        go(Wire(*sites), study, run)

    assert list(run.events()) == []
    assert [site.trained for site in sites] == [0, 0]


def test_a_founded_registry_is_refreshed_for_those_who_follow_it(tmp_path: Path) -> None:
    from fedward.core.files import write_atomic
    from fedward.server.updates import found_registry
    from fedward.serving.store import Store
    from fedward.serving.updates import Updates

    study = study_of(2)
    run = run_of(tmp_path / "run", study)
    registry = run.path / "registry"
    root = found_registry(registry, roots=[PUBLISHER], threshold=1, publisher=PUBLISHER)
    store = Store(tmp_path / "store")
    write_atomic(store.folder / "trusted.pem", PUBLISHER.public.pem())
    follower = Updates(store, registry, root.read_bytes())

    before = follower.look(), store.served()
    go(Wire(ASite("a", 1.0), ASite("b", 0.0)), study, run)
    after = follower.look()

    assert before == (None, {})
    assert after is None
    assert [served.version for served in store.served().values()] == [1]
    assert "registry refreshed" in [event["event"] for event in run.events()]


def test_a_registry_of_another_publisher_is_left_and_the_run_ends_well(tmp_path: Path) -> None:
    from fedward.server.updates import found_registry

    study = study_of(2)
    run = run_of(tmp_path / "run", study)
    other = Identity.generate_publisher()
    registry = run.path / "registry"
    found_registry(registry, roots=[other], threshold=1, publisher=other)
    before = {path: path.read_bytes() for path in (registry / "tuf").iterdir()}

    go(Wire(ASite("a", 1.0), ASite("b", 0.0)), study, run)

    assert "another publisher" in reasons(run, "registry not refreshed")[0]
    assert {path: path.read_bytes() for path in (registry / "tuf").iterdir()} == before
    assert (run.path / "metrics.json").exists()
