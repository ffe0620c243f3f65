"""The operator's page: small, self-contained, and alive in a real browser."""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from release_samples import MODEL, publish_sample, release_files
from serving_client import adapter, ask, ask_async

from fedward.core.identity import Identity
from fedward.server.registry import Registry
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.service import Service
from fedward.serving.store import Store

_IDENTITY = Identity.generate_publisher()
_MONITOR = {
    "format": 1,
    "fields": {"age": {"edges": [18, 40, 60, 120], "shares": [0.6, 0.3, 0.1], "missing": 0.0}},
    "prediction": {"edges": [0, 0.5, 1], "shares": [0.5, 0.5], "missing": 0.0},
}


_OURS = ("/", "/page.css", "/page.js")
# As in the packages htm 3.1.1 and uplot 1.6.32 of the npm registry.
_THEIRS = {
    "/preact-htm.js": "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7",
    "/uplot.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "/uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


def test_the_page_is_small_and_asks_nothing_of_others() -> None:
    app = App(Service(Catalogue([])))
    ours = [ask(app, "GET", path) for path in _OURS]
    theirs = {path: ask(app, "GET", path) for path in (*_THEIRS, "/LICENSES.txt")}

    replies = [*ours, *theirs.values()]
    assert [reply.status for reply in replies] == [200] * 7
    assert sum(len(reply.body) for reply in replies) < 100_000
    for reply in replies:
        assert "default-src 'none'" in reply.headers["content-security-policy"]
    for reply in ours:
        assert b"http:" not in reply.body
        assert b"https:" not in reply.body
        assert b"innerhtml" not in reply.body.lower()
    for path, digest in _THEIRS.items():
        assert hashlib.sha256(theirs[path].body).hexdigest() == digest, path
    for name in (b"Jason Miller", b"Leon Sorokin", b"Google Inc."):
        assert name in theirs["/LICENSES.txt"].body
    assert ask(app, "GET", "/../keys.json").status == 404


def test_status_comes_as_events_when_it_changes_and_ends_with_the_adapter(tmp_path: Path) -> None:
    store, registry = Store(tmp_path / "store"), tmp_path / "registry"
    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)
    with (
        adapter(store.folder, tmp_path / "ready.json") as (address, process),
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        with client.stream("GET", "/events") as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            first = json.loads(next(lines)[6:])
            store.install(publish_sample(registry, _IDENTITY, bias=-1.0), _IDENTITY.public)
            while (then := json.loads(next(lines)[6:]))["models"][0]["version"] == 1:
                pass
            kind = stream.headers["content-type"]
        with client.stream("GET", "/events") as stream:
            parts = stream.iter_lines()
            next(parts)
            start = time.monotonic()
            process.terminate()
            rest = [part for part in parts if part]  # to the end, which is a proper one
            process.wait(20)
            stopped = time.monotonic() - start

    assert kind == "text/event-stream"
    assert first["models"][0]["version"] == 1
    assert then["models"][0]["version"] == 2
    assert len(rest) <= 1
    assert stopped < 4  # not the grace that requests under way have


def test_only_so_many_follow_and_who_leaves_makes_room() -> None:
    service = Service(Catalogue([]))
    app = App(service)

    async def scene() -> tuple[int, int]:
        streams = [service.events() for _ in range(16)]
        for stream in streams:
            await anext(stream)
        full = (await ask_async(app, "GET", "/events")).status
        for stream in streams:
            await stream.aclose()
        sent: list[Any] = []

        async def leaves() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/events", "headers": []}
        await app(scope, leaves, send)
        return full, sent[0]["status"]

    assert asyncio.run(scene()) == (429, 200)


class _Browser:
    """A page in headless Chromium, over the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message: dict[str, Any] = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == self._number:
                return dict(message["result"])

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value", "")

    def text(self) -> str:
        return str(self.evaluate("document.body.innerText"))

    def wait_for(self, words: str) -> str:
        deadline = time.monotonic() + 30
        while words not in (text := self.text()):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return text


@contextmanager
def _browser(folder: Path, url: str) -> Iterator[_Browser]:
    connect = pytest.importorskip("websockets.sync.client").connect
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if binary is None:
        pytest.skip("needs chromium")
    command = [binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-dev-shm-usage"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([*command, url], stdout=quiet, stderr=quiet) as process:
        try:
            port_file = folder / "DevToolsActivePort"
            deadline = time.monotonic() + 60
            while not port_file.exists() or not port_file.read_text().strip():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            port = port_file.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as pages:
                page = next(p for p in json.load(pages) if p["type"] == "page")
            with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                yield _Browser(socket)
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.e2e
def test_a_version_change_and_a_drift_alarm_appear(tmp_path: Path) -> None:
    store, registry = Store(tmp_path / "store"), tmp_path / "registry"
    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)

    def build(version: int) -> dict[str, bytes]:
        return {**release_files(version), "monitor.json": json.dumps(_MONITOR).encode()}

    with (
        adapter(store.folder, tmp_path / "ready.json") as (address, _),
        _browser(tmp_path / "profile", address) as page,
    ):
        page.wait_for("version 1")
        folder = Registry(registry).add(MODEL, build, identity=_IDENTITY)
        store.install(folder, _IDENTITY.public)
        page.wait_for("version 2")
        with httpx.Client(base_url=address) as client:
            for _ in range(300):
                client.post("/predict", json={"age": 95, "sex": "male"}).raise_for_status()
        text = page.wait_for("Drift in age of tiny")
        asked = page.evaluate(
            "JSON.stringify(performance.getEntriesByType('resource').map((one) => one.name))"
        )
        drawn = page.evaluate("document.querySelectorAll('.uplot canvas').length")
        if "FEDWARD_SCREENSHOTS" in os.environ:
            import base64

            image = page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            target = Path(os.environ["FEDWARD_SCREENSHOTS"]) / "adapter-page.png"
            target.write_bytes(base64.b64decode(image))

    assert all(url.startswith((address, "data:")) for url in json.loads(asked)), asked
    assert f"{address}/uplot.js" in json.loads(asked)
    assert drawn == 1
    assert "Differentially private" in text
    assert "Roll back to version 1" in text
