"""A serving adapter as a child process, for the demo and for tests."""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedward.core.errors import RunError

_UP_WITHIN = 30.0


class LocalAdapter:
    """`fedward serve` on a free port of loopback, as a context.

    Args:
        store: The store to serve.

    Attributes:
        url: Where it listens, once entered.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self.url = ""

    def __enter__(self) -> Self:
        """Start it; returns once it says that it is ready."""
        self._folder = tempfile.TemporaryDirectory(prefix="fedward-adapter-")
        ready = Path(self._folder.name) / "ready.json"
        log = Path(self._folder.name) / "log"
        command = [sys.executable, "-m", "fedward.serving", "--store", str(self._store)]
        command += ["--port", "0", "--ready-file", str(ready)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603
        until = time.monotonic() + _UP_WITHIN
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                said = log.read_text(encoding="utf-8", errors="replace").strip()[-500:]
                self._stop()
                raise RunError(f"the adapter did not come up: {said}")
            time.sleep(0.02)
        where = json.loads(ready.read_text(encoding="utf-8"))
        self.url = f"http://{where['host']}:{where['port']}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self._stop()

    def predict(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for one patient's risk by named clinical fields."""
        request = urllib.request.Request(  # noqa: S310 (our own loopback address)
            f"{self.url}/predict",
            data=json.dumps(fields).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            value: dict[str, Any] = json.load(answer)
            return value

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
