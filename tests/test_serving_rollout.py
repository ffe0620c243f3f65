"""Shadow, canary, all: a new release earns its place, or goes back with the reason."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from release_samples import (
    MODEL,
    SIGNATURE,
    publish_sample,
    release_files,
    sigmoid_of,
    valid_inputs,
)
from serving_client import adapter, ask

from fedward.core.errors import ReleaseRejected
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.server.registry import Registry
from fedward.serving.__main__ import main
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue, Live
from fedward.serving.engine import Engine, start_engine
from fedward.serving.routes import infer_now
from fedward.serving.service import Service
from fedward.serving.staging import Candidate, Limits, policy_limits
from fedward.serving.store import Store
from fedward.serving.trial import Trial, why_not_comparable
from fedward.serving.watcher import Watcher

_IDENTITY = Identity.generate_publisher()
_PATIENT = {"age": 63, "sex": "male", "cholesterol": 240, "smoker": True}
_INPUT = np.array([[63, 1, 240, 1]], np.float32)
_LIMITS = Limits(shadow=60, canary=60, share=0.5, max_slowdown=1000)


def _right(bias: float) -> float:
    return float(sigmoid_of(_INPUT, bias=bias)[0, 0])


class Scene:
    """A store, its watcher, and an adapter in this process."""

    def __init__(self, folder: Path, *, limits: Limits | None = _LIMITS) -> None:
        self.store = Store(folder / "store", limits=limits)
        self.registry = folder / "registry"
        self.catalogue = Catalogue([])
        self.service = Service(self.catalogue, store=self.store)
        self.app = App(self.service)
        self.watcher = Watcher(self.store, self.catalogue, self.service.told)
        self.publish(-2.0)
        self.watcher.look()

    def publish(self, bias: float) -> Path:
        folder = publish_sample(self.registry, _IDENTITY, bias=bias)
        self.store.install(folder, _IDENTITY.public)
        return folder

    def ask(self, count: int, *, key: str | None = None) -> list[tuple[int, float]]:
        headers = {} if key is None else {"X-Request-Key": key}
        answers = []
        for _ in range(count):
            reply = ask(self.app, "POST", "/predict", _PATIENT, headers)
            assert reply.status == 200
            answers.append((reply.json["model"]["version"], reply.json["probability"]))
        trial = self.catalogue.trial(MODEL)
        if trial is not None:
            trial.settle()
        return answers

    @property
    def trial(self) -> Trial:
        trial = self.catalogue.trial(MODEL)
        assert trial is not None
        return trial

    @property
    def stage(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service.status()["rollout"][MODEL]
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.catalogue.end_trial(MODEL)


# --- the way in --------------------------------------------------------------------------------


def test_a_good_release_goes_through_every_stage(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.watcher.look()
    assert scene.stage["stage"] == "shadow"

    as_shadow = scene.ask(60)
    assert scene.stage["rows"] == 60
    scene.watcher.look()
    assert scene.stage["stage"] == "canary"
    as_canary = scene.ask(150)
    scene.watcher.look()
    alone = scene.ask(5)

    assert {version for version, _ in as_shadow} == {1}
    assert {version for version, _ in as_canary} == {1, 2}
    assert {version for version, _ in alone} == {2}
    for version, probability in (*as_shadow, *as_canary, *alone):
        assert probability == pytest.approx(_right({1: -2.0, 2: -1.9}[version]), abs=2e-6)
    assert scene.service.status()["rollout"] == {}
    assert scene.store.served()[MODEL].version == 2


def test_nothing_of_a_shadow_reaches_a_caller(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.watcher.look()

    for path, body in (
        ("/predict", _PATIENT),
        ("/explain", _PATIENT),
        (f"/v1/models/{MODEL}:predict", {"instances": [_PATIENT]}),
    ):
        answers = {ask(scene.app, "POST", path, body).body for _ in range(10)}
        assert len(answers) == 1
        assert b'"version":2' not in answers.pop().replace(b" ", b"")
    assert ask(scene.app, "GET", f"/v2/models/{MODEL}").json["versions"] == ["1"]
    assert ask(scene.app, "POST", f"/v2/models/{MODEL}/versions/2/infer", b"{}").status == 404


def test_a_request_key_keeps_its_version_and_the_share_is_kept(scene: Scene) -> None:
    """False-alarm rate 1e-9: the share of 2,000 keys is within 6.2 standard deviations."""
    scene.publish(-1.9)
    scene.watcher.look()
    scene.ask(60)
    scene.watcher.look()

    versions = {}
    for key in ("a", "b", "c", "d", "e", "f", "g", "h"):
        found = {version for version, _ in scene.ask(4, key=key)}
        assert len(found) == 1
        versions[key] = found.pop()
    drawn = [scene.trial.takes([(b"x-request-key", str(n).encode())]) for n in range(2000)]

    assert set(versions.values()) == {1, 2}
    assert abs(np.mean(drawn) - 0.5) < 6.2 * 0.5 / np.sqrt(2000)


def test_off_a_release_serves_at_once_and_the_first_never_waits(tmp_path: Path) -> None:
    off, on = Scene(tmp_path / "off", limits=None), Scene(tmp_path / "on")

    off.publish(-1.9)
    off.watcher.look()

    assert off.catalogue.get().signature.version == 2
    assert off.catalogue.get().trial is None
    assert off.catalogue.choose(None, None, ()) is off.catalogue.get()
    assert on.catalogue.get().signature.version == 1  # nobody served before it
    assert on.store.candidates() == {}


# --- the way back ------------------------------------------------------------------------------


def test_a_release_that_disagrees_goes_back_with_the_reason(scene: Scene) -> None:
    folder = scene.publish(3.0)
    scene.watcher.look()

    answers = scene.ask(60)
    scene.watcher.look()
    answers += scene.ask(5)

    assert {version for version, _ in answers} == {1}
    assert scene.stage["stage"] == "failed"
    assert "differed by more than 0.1 on 100.0% of 60 rows" in scene.stage["reason"]
    assert "differed" in scene.service.status()["alarms"][-1]
    kept = (scene.store.folder / "refused.jsonl").read_text().splitlines()
    assert "differed" in json.loads(kept[-1])["reason"]
    with pytest.raises(ReleaseRejected, match="failed it"):
        scene.store.install(folder, _IDENTITY.public)


class _Slow(Engine):
    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        time.sleep(0.01)
        return super().predict(inputs)


class _Broken(Engine):
    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        raise RuntimeError(f"a value of a patient: {inputs[0, 0]}")


class _Nan(Engine):
    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return super().predict(inputs) * np.float32(np.nan)


def _as(kind: type[Engine], engine: Engine) -> Engine:
    return kind(**{field.name: getattr(engine, field.name) for field in fields(Engine)})


def _trial(
    scene: Scene, kind: type[Engine], *, stage: str = "shadow", limits: Limits = _LIMITS
) -> Trial:
    """A trial of the served version against one of its kind that misbehaves."""
    old = scene.catalogue.get().engine
    candidate = Candidate(2, "0" * 64, stage, limits)  # type: ignore[arg-type] # a literal
    trial = Trial(candidate, old=old, new=_as(kind, old))
    scene.catalogue.begin_trial(trial)
    return trial


def test_a_slow_release_goes_back(scene: Scene) -> None:
    trial = _trial(scene, _Slow, limits=replace(_LIMITS, max_slowdown=3))

    scene.ask(60)

    assert "at most 3 times" in str(trial.verdict())


def test_a_shadow_that_fails_harms_nobody_and_goes_back(scene: Scene) -> None:
    trial = _trial(scene, _Broken)

    answers = scene.ask(3)

    assert [version for version, _ in answers] == [1, 1, 1]
    verdict = str(trial.verdict())
    assert verdict.startswith("3 errors as shadow, the first: RuntimeError")
    assert "63" not in verdict  # no patient's value


def test_a_canary_that_fails_gets_no_second_request(scene: Scene) -> None:
    _trial(scene, _Broken, stage="canary", limits=replace(_LIMITS, share=1.0))

    statuses = [ask(scene.app, "POST", "/predict", _PATIENT).status for _ in range(5)]

    assert statuses == [500, 200, 200, 200, 200]


def test_an_answer_that_is_no_number_is_no_agreement(scene: Scene) -> None:
    trial = _trial(scene, _Nan)

    scene.ask(60)

    assert "differed" in str(trial.verdict())


def test_a_full_queue_drops_comparisons_and_delays_nobody(scene: Scene) -> None:
    trial = _trial(scene, _Slow)

    started = time.monotonic()
    for _ in range(400):
        scene.catalogue.get().predict(_INPUT)
    took = time.monotonic() - started
    shown = trial.to_json()

    assert took < 0.5 * 400 * 0.01
    assert shown["not_compared"] > 0


def test_another_interface_cannot_be_compared_and_goes_back(scene: Scene) -> None:
    other = replace(SIGNATURE, fields=SIGNATURE.fields[::-1])
    assert why_not_comparable(SIGNATURE, SIGNATURE) is None
    assert "promote it by hand" in str(why_not_comparable(SIGNATURE, other))

    def build(version: int) -> dict[str, bytes]:
        files = release_files(version)
        changed = replace(SIGNATURE, version=version).to_json()
        changed["fields"][0]["unit"] = "months"
        return {**files, "signature.json": json.dumps(changed).encode()}

    folder = Registry(scene.registry).add(MODEL, build, identity=_IDENTITY)
    scene.store.install(folder, _IDENTITY.public)
    scene.watcher.look()

    assert scene.stage["stage"] == "failed"
    assert "cannot be compared" in scene.stage["reason"]
    assert scene.ask(1)[0][0] == 1


def test_a_candidate_that_changes_on_disk_never_serves(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.watcher.look()
    scene.ask(60)
    scene.watcher.look()
    (scene.store.path(MODEL, 2) / "model.onnx").write_bytes(b"changed on disk")

    scene.ask(150)
    scene.watcher.look()

    assert scene.stage["stage"] == "failed"
    assert {version for version, _ in scene.ask(20)} == {1}


def test_a_newer_candidate_takes_the_place_of_an_older(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.watcher.look()
    scene.publish(-1.8)
    scene.watcher.look()

    assert (scene.stage["version"], scene.stage["stage"], scene.stage["rows"]) == (3, "shadow", 0)


# --- people ------------------------------------------------------------------------------------


def test_where_policy_asks_for_it_nothing_is_tried_unapproved(tmp_path: Path) -> None:
    scene = Scene(tmp_path, limits=None)
    policy = {"approval": True, "rollout": {"shadow": 50}}
    (scene.store.folder / "policy.json").write_text(json.dumps(policy))
    scene.publish(-1.9)
    scene.watcher.look()
    assert scene.service.status()["rollout"] == {}

    scene.store.decide(MODEL, 2, by="Dr Lee", approve=True)
    scene.watcher.look()

    assert scene.stage["stage"] == "shadow"
    assert scene.catalogue.get().signature.version == 1
    assert scene.service.status()["waiting"] == {}
    scene.catalogue.end_trial(MODEL)


def test_a_named_person_may_end_the_stages(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.watcher.look()
    words = ["promote", "--store", str(scene.store.folder), "--by"]

    assert main([*words, " ", MODEL, "2"]) == 1
    assert main([*words, "Dr Lee", MODEL, "3"]) == 1
    assert main([*words, "Dr Lee", MODEL, "2"]) == 0
    scene.watcher.look()

    assert scene.catalogue.get().signature.version == 2
    decision = json.loads((scene.store.folder / "approvals.jsonl").read_text())
    assert (decision["by"], decision["version"]) == ("Dr Lee", 2)


def test_a_roll_back_after_it_does_not_try_it_again(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.store.advance(MODEL, 2, by="Dr Lee")
    scene.watcher.look()

    scene.store.roll_back(MODEL)
    scene.watcher.look()

    assert scene.catalogue.get().signature.version == 1
    assert scene.catalogue.trial(MODEL) is None


@pytest.mark.parametrize(
    "rollout",
    [[], {"shadows": 1}, {"shadow": -1}, {"shadow": 1.5}, {"share": 2}, {"canary": 1, "share": 0},
     {"max_slowdown": 0.5}, {"tolerance": "much"}, {"max_errors": True}],
)  # fmt: skip
def test_a_rollout_that_makes_no_sense_lets_nothing_in(scene: Scene, rollout: object) -> None:
    (scene.store.folder / "policy.json").write_text(
        json.dumps({"approval": False, "rollout": rollout})
    )

    with pytest.raises(ReleaseRejected, match=r"policy\.json"):
        scene.publish(-1.9)
    assert scene.store.served()[MODEL].version == 1


def test_a_policy_says_as_much_as_the_options() -> None:
    assert policy_limits({"rollout": {"shadow": 60, "canary": 60}}) == Limits(shadow=60, canary=60)
    assert policy_limits({}) is None


# --- crashes -----------------------------------------------------------------------------------


def _until(store: Store, folder: Path, *, stop: Callable[[], None]) -> None:
    """Install a release and take it through its stages."""
    store.install(folder, _IDENTITY.public)
    stop()
    while store.served()[MODEL].version == 1:
        store.advance(MODEL, 2)
        stop()


def _killed_at(step: int, store: Store, folder: Path) -> bool:
    """Do it in a process that kills itself at a step of the file system; whether it did."""
    child = os.fork()
    if child == 0:
        _run_and_die(step, store, folder)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _run_and_die(step: int, store: Store, folder: Path) -> NoReturn:
    left = step

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **options)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    try:
        _until(store, folder, stop=lambda: None)
    finally:
        os._exit(0)


def test_a_kill_at_every_step_leaves_the_old_or_the_new_one_serving(tmp_path: Path) -> None:
    folders = [publish_sample(tmp_path / "registry", _IDENTITY, bias=b) for b in (-2.0, -1.9)]
    kills = 0
    versions = []
    for step in range(200):
        store = Store(tmp_path / f"store-{step}", limits=_LIMITS)
        store.install(folders[0], _IDENTITY.public)
        if not _killed_at(step, store, folders[1]):
            break
        kills += 1

        after = store.newest()  # verifies everything again
        version = after.signature.version
        versions.append(version)
        assert after.predict(_INPUT)[0, 0] == pytest.approx(
            _right({1: -2.0, 2: -1.9}[version]), abs=2e-6
        )
        catalogue = Catalogue([])
        service = Service(catalogue)
        watcher = Watcher(store, catalogue, service.told)
        watcher.look()
        assert catalogue.get().signature.version == version
        assert service.alarms == []
        catalogue.end_trial(MODEL)
        _until(store, folders[1], stop=lambda: None)  # and it can be gone on with
        assert store.newest().signature.version == 2

    assert 10 < kills < 199
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}


@pytest.mark.e2e
def test_an_adapter_killed_in_a_stage_goes_on_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", _IDENTITY, bias=-2.0), _IDENTITY.public)
    store = replace(store, limits=_LIMITS)
    store.install(publish_sample(tmp_path / "registry", _IDENTITY, bias=-1.9), _IDENTITY.public)
    seen: list[set[int]] = []
    stages = []
    for number in range(3):
        ready = tmp_path / f"ready-{number}"
        with adapter(store.folder, ready, "--look-every", "0.02") as (address, process):
            with httpx.Client(base_url=address) as client:
                versions: set[int] = set()
                before = store.candidates().get(MODEL)
                stages.append("all" if before is None else before.stage)
                for _ in range(2000):
                    reply = client.post("/predict", json=_PATIENT).raise_for_status().json()
                    versions.add(reply["model"]["version"])
                    now = store.candidates().get(MODEL)
                    if now != before:
                        break
                seen.append(versions)
            process.send_signal(signal.SIGKILL)
            process.wait()

    assert stages == ["shadow", "canary", "all"]
    assert seen[0] <= {1, 2}
    assert seen[2] == {2}


@pytest.mark.e2e
def test_a_rollout_under_load_loses_no_request(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", _IDENTITY, bias=-2.0), _IDENTITY.public)
    options = ("--look-every", "0.02", "--shadow", "200", "--canary", "200", "--share", "0.3")
    answers: list[tuple[int, float]] = []
    tensors: list[tuple[int, float]] = []
    done = threading.Event()

    with adapter(store.folder, tmp_path / "ready", *options, "--max-slowdown", "1000") as (url, _):

        def by_name() -> None:
            with httpx.Client(base_url=url) as http:
                while not done.is_set():
                    reply = http.post("/predict", json=_PATIENT).raise_for_status().json()
                    answers.append((reply["model"]["version"], reply["probability"]))

        def by_tensor() -> None:
            tensor = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": _INPUT.tolist()}
            with httpx.Client(base_url=url) as http:
                while not done.is_set():
                    reply = http.post(f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]})
                    value = reply.raise_for_status().json()
                    tensors.append((int(value["model_version"]), value["outputs"][0]["data"][0]))

        threads = [threading.Thread(target=act) for act in (by_name, by_name, by_tensor)]
        for thread in threads:
            thread.start()
        store = replace(store, limits=_LIMITS)
        store.install(publish_sample(tmp_path / "registry", _IDENTITY, bias=-1.9), _IDENTITY.public)
        deadline = time.monotonic() + 60
        while store.served()[MODEL].version == 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        done.set()
        for thread in threads:
            thread.join()

    assert {version for version, _ in answers} == {version for version, _ in tensors} == {1, 2}
    assert answers[-1][0] == tensors[-1][0] == 2
    for version, probability in (*answers, *tensors):
        assert probability == pytest.approx(_right({1: -2.0, 2: -1.9}[version]), abs=2e-6)


def test_inputs_that_only_the_old_version_takes_count_as_errors(scene: Scene) -> None:
    """The candidate's guard is part of the candidate."""

    def build(version: int) -> dict[str, bytes]:
        narrow = replace(SIGNATURE.fields[0], high=90.0)
        signature = replace(SIGNATURE, version=version, fields=(narrow, *SIGNATURE.fields[1:]))
        return {
            **release_files(version),
            "signature.json": json.dumps(signature.to_json()).encode(),
        }

    folder = Registry(scene.registry).add(MODEL, build, identity=_IDENTITY)
    new = start_engine(read_release(folder, _IDENTITY.public))
    trial = Trial(
        Candidate(2, "0" * 64, "shadow", _LIMITS), old=scene.catalogue.get().engine, new=new
    )
    scene.catalogue.begin_trial(trial)
    live: Live = scene.catalogue.get()

    live.predict(valid_inputs(1))
    live.predict(np.array([[119, 1, 240, 1]], np.float32))
    trial.settle()

    assert trial.errors == 1
    assert "age is not allowed" in str(trial.verdict())


def test_the_short_way_of_an_inference_knows_the_canary(scene: Scene) -> None:
    scene.publish(-1.9)
    scene.watcher.look()
    scene.ask(60)
    scene.watcher.look()
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": _INPUT.tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()

    def version(key: str) -> str:
        headers = [(b"x-request-key", key.encode())]
        answer, _ = infer_now(scene.service, (MODEL, None), headers, body, None)
        return str(json.loads(answer.body)["model_version"])

    for key in "abcdefgh":
        (wanted,) = {str(number) for number, _ in scene.ask(2, key=key)}
        assert version(key) == wanted
