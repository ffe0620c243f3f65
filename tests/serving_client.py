"""Ask an ASGI application in this process, and a served adapter in another."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_App = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    app: _App,
    method: str,
    path: str,
    body: bytes | object = b"",
    headers: dict[str, str] | None = None,
) -> Reply:
    """One request, in one piece. A body that is not bytes is sent as JSON."""
    return asyncio.run(ask_async(app, method, path, body, headers))


async def ask_async(
    app: _App,
    method: str,
    path: str,
    body: bytes | object = b"",
    headers: dict[str, str] | None = None,
) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
    raw.append((b"content-length", str(len(content)).encode()))
    plain, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": plain,
        "query_string": query.encode(),
        "headers": raw,
        "client": ("127.0.0.1", 1),
    }
    await app(scope, receive, send)
    start = sent[0]
    answered = {k.decode(): v.decode() for k, v in start["headers"]}
    return Reply(start["status"], answered, b"".join(m.get("body", b"") for m in sent[1:]))


@contextmanager
def adapter(store: Path, ready: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A served store in a process of its own: its address, and the process."""
    command = [sys.executable, "-m", "fedward.serving", "--store", str(store), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--ready-file", str(ready), *options], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the adapter did not start: {process.communicate()[1]}")
            time.sleep(0.02)
        where = json.loads(ready.read_text())
        yield f"http://{where['host']}:{where['port']}", process
    finally:
        process.terminate()
        process.communicate(timeout=30)
