"""Versions change under load, and a promotion is killed half way: somebody always answers."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from release_samples import publish_sample, sigmoid_of
from serving_client import adapter, ask_async

from fedward.core.errors import SignatureInvalid
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.service import Service
from fedward.serving.store import Store
from fedward.serving.watcher import Watcher

_IDENTITY = Identity.generate_publisher()
_PATIENT = {"age": 63, "sex": "male", "cholesterol": 240, "smoker": True}
_INPUT = np.array([[63, 1, 240, 1]], np.float32)


def _bias(version: int) -> float:
    return -2.0 + 0.02 * version


def _right(version: int) -> float:
    return float(sigmoid_of(_INPUT, bias=_bias(version))[0, 0])


def _publish(registry: Path, count: int, *, first: int = 1) -> list[Path]:
    return [
        publish_sample(registry, _IDENTITY, bias=_bias(version))
        for version in range(first, first + count)
    ]


def _untold(action: str, **facts: object) -> None:
    assert action == "promoted", facts


def test_every_answer_matches_the_version_stamped_on_it(tmp_path: Path) -> None:
    folders = _publish(tmp_path / "registry", 10)
    engines = [start_engine(read_release(folder, _IDENTITY.public)) for folder in folders]
    catalogue = Catalogue(engines[:1])
    app = App(Service(catalogue))
    answers: list[tuple[int, float]] = []

    async def client(stop: asyncio.Event) -> None:
        while not stop.is_set():
            reply = await ask_async(app, "POST", "/predict", _PATIENT)
            assert reply.status == 200
            answers.append((reply.json["model"]["version"], reply.json["probability"]))
            await asyncio.sleep(0)

    async def scene() -> None:
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(stop)) for _ in range(8)]
        for swap in range(100):
            await asyncio.to_thread(catalogue.promote, engines[(swap + 1) % 10])
        stop.set()
        await asyncio.gather(*clients)

    asyncio.run(scene())

    assert len({version for version, _ in answers}) > 1
    for version, probability in answers:
        assert probability == pytest.approx(_right(version), abs=2e-6)


def test_the_watcher_follows_installs_and_roll_backs(tmp_path: Path) -> None:
    store, catalogue = Store(tmp_path / "store"), Catalogue([])
    watcher = Watcher(store, catalogue, _untold)
    for folder in _publish(tmp_path / "registry", 2):
        store.install(folder, _IDENTITY.public)
        watcher.look()

    assert catalogue.get("tiny").signature.version == 2

    store.roll_back("tiny")
    watcher.look()
    assert catalogue.get("tiny").signature.version == 1


def test_a_version_that_no_longer_verifies_does_not_replace_the_one_that_serves(
    tmp_path: Path,
) -> None:
    store, catalogue = Store(tmp_path / "store"), Catalogue([])
    told: list[tuple[str, object]] = []

    def tell(action: str, **facts: object) -> None:
        told.append((action, facts["version"]))

    watcher = Watcher(store, catalogue, tell)
    first, second = _publish(tmp_path / "registry", 2)
    store.install(first, _IDENTITY.public)
    watcher.look()
    store.install(second, _IDENTITY.public)
    (store.path("tiny", 2) / "model.onnx").write_bytes(b"changed on disk")
    watcher.look()
    watcher.look()

    assert catalogue.get("tiny").signature.version == 1
    assert told == [("promoted", 1), ("refused", 2)]
    with pytest.raises(SignatureInvalid):
        store.newest()


class _Clients:
    """Threads that ask for the same patient until told to stop."""

    def __init__(self, address: str) -> None:
        self.answers: list[tuple[int, float]] = []
        self.failures: list[str] = []
        self._address, self._done = address, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._address) as client:
            while not self._done.is_set():
                reply = client.post("/predict", json=_PATIENT)
                if reply.status_code != 200:
                    self.failures.append(reply.text)
                    return
                answer = reply.json()
                self.answers.append((answer["model"]["version"], answer["probability"]))


def _wait_for(client: httpx.Client, version: int) -> None:
    deadline = time.monotonic() + 20
    while client.get("/v2/models/tiny").json()["versions"] != [str(version)]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.e2e
def test_a_hundred_swaps_and_ten_roll_backs_lose_no_request(tmp_path: Path) -> None:
    store, registry = Store(tmp_path / "store"), tmp_path / "registry"
    store.install(_publish(registry, 1)[0], _IDENTITY.public)

    with (
        adapter(store.folder, tmp_path / "ready", "--look-every", "0.01") as (address, _),
        httpx.Client(base_url=address) as client,
    ):
        clients = _Clients(address)
        for version in range(2, 102):
            store.install(_publish(registry, 1, first=version)[0], _IDENTITY.public)
            _wait_for(client, version)
        for _ in range(10):
            _wait_for(client, store.roll_back("tiny").version)
        clients.stop()

    assert clients.failures == []
    assert len({version for version, _ in clients.answers}) > 50
    for version, probability in clients.answers:
        assert probability == pytest.approx(_right(version), abs=2e-6)


_INSTALLER = """
import sys
from pathlib import Path
from fedward.core.identity import PublicIdentity
from fedward.serving.store import Store
trusted = PublicIdentity.from_pem(Path(sys.argv[1]).read_bytes())
store = Store(Path(sys.argv[2]))
print("begin", flush=True)
for folder in sys.argv[3:]:
    store.install(Path(folder), trusted)
"""


@pytest.mark.e2e
def test_a_killed_promotion_leaves_the_old_version_or_the_new_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folders = _publish(tmp_path / "registry", 61)
    store.install(folders[0], _IDENTITY.public)
    (tmp_path / "key.pub").write_bytes(_IDENTITY.public.pem())
    rng = random.Random(5)
    before, stopped_early = 1, 0
    for _ in range(10):
        waiting = [str(folder) for folder in folders[before:]]
        if not waiting:
            break
        command = [sys.executable, "-c", _INSTALLER, str(tmp_path / "key.pub"), str(store.folder)]
        with subprocess.Popen([*command, *waiting], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            stopped_early += process.wait() == -signal.SIGKILL

        engine = store.newest()  # verifies everything again

        after = engine.signature.version
        assert after >= before
        assert engine.predict(_INPUT)[0, 0] == pytest.approx(_right(after), abs=2e-6)
        before = after
    assert stopped_early > 0
    assert before > 1
