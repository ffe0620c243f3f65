"""The operator's page: small, self-contained, and alive in a real browser."""

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
from serving_client import adapter, ask

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


def test_the_page_is_small_and_asks_nothing_of_others() -> None:
    app = App(Service(Catalogue([])))
    replies = [ask(app, "GET", path) for path in ("/", "/page.css", "/page.js")]

    assert [reply.status for reply in replies] == [200] * 3
    assert sum(len(reply.body) for reply in replies) < 100_000
    for reply in replies:
        assert b"http:" not in reply.body
        assert b"https:" not in reply.body
        assert b"innerHTML" not in reply.body
        assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert ask(app, "GET", "/../keys.json").status == 404


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

    def text(self) -> str:
        result = self.call("Runtime.evaluate", expression="document.body.innerText")
        return str(result["result"].get("value", ""))

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
        if "FEDWARD_SCREENSHOTS" in os.environ:
            import base64

            image = page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            target = Path(os.environ["FEDWARD_SCREENSHOTS"]) / "adapter-page.png"
            target.write_bytes(base64.b64decode(image))

    assert "Differentially private" in text
    assert "Roll back to version 1" in text
