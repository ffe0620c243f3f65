"""The adapter as a raw ASGI application.

Bad input is answered with a 4xx and JSON that says what is wrong in which field; an error of our
own with a 500 that says nothing of the request.
"""

import json
import logging
import time

from fedward.serving.http import (
    JSON_TYPE,
    Answer,
    Disconnected,
    Receive,
    Scope,
    Send,
    Stream,
    send_answer,
    send_stream,
)
from fedward.serving.problems import Problem
from fedward.serving.roles import ANYONE
from fedward.serving.routes import ROUTES, Request, Route
from fedward.serving.service import Service

_LOG = logging.getLogger("fedward.serving")
_OTHER = "other"


class App:
    """The ASGI application over a service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        start = time.perf_counter()
        name = _OTHER
        answer: Answer | Stream
        try:
            route, parts = find_route(scope["method"], scope["path"])
            name = route.name
            answer = await self._answer(route, parts, scope, receive)
        except Disconnected:
            return
        except Exception as error:  # noqa: BLE001 (the last line before the network)
            answer = answer_error(name, error)
        if isinstance(answer, Stream):
            self.service.answered(name, 200, time.perf_counter() - start, scope["headers"])
            await send_stream(receive, send, answer)
            return
        await send_answer(send, answer)
        seconds = time.perf_counter() - start
        self.service.answered(name, answer.status, seconds, scope["headers"])

    async def _answer(
        self, route: Route, parts: tuple[str | None, ...], scope: Scope, receive: Receive
    ) -> Answer | Stream:
        caller = ANYONE
        if route.roles is not None:
            caller = self.service.admit(scope["headers"], route.roles, path=scope["path"])
        return await route.handler(Request(self.service, scope, receive, parts, caller))


def find_route(method: str, path: str) -> tuple[Route, tuple[str | None, ...]]:
    """The route of a request and what its path's groups matched.

    Raises:
        Problem: 404, or 405 with what is allowed.
    """
    allowed = None
    for route in ROUTES:
        match = route.path.fullmatch(path)
        if match is None:
            continue
        if method == route.method or (method == "HEAD" and route.method == "GET"):
            return route, match.groups()
        allowed = route.method
    if allowed is not None:
        raise Problem(
            405, f"{method} is not allowed here; use {allowed}", headers={"allow": allowed}
        )
    raise Problem(404, "no such path; see GET /v2, POST /predict")


def answer_error(route: str, error: Exception) -> Answer:
    """A `Problem` as it says; anything else as an error of ours, of which the log says more."""
    if isinstance(error, Problem):
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        return Answer(json.dumps(error.to_json()).encode(), error.status, (JSON_TYPE, *headers))
    # The type only: a message may quote a patient's values.
    _LOG.error("answering %s failed: %s", route, type(error).__name__)
    return Answer(b'{"error":"internal error; see the adapter\'s log"}', 500)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
