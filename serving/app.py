"""The adapter as a raw ASGI application: routes, bodies and statuses.

Bad input is answered with a 4xx and JSON that says what is wrong in which field; an error of our
own with a 500 that says nothing of the request.
"""

import asyncio
import json
import logging
import re
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.serving import clinical, oip
from fedward.serving.catalogue import Catalogue, Live
from fedward.serving.problems import Problem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY = 8 * 2**20
_LONGEST_LENGTH = 18  # digits; the HTTP parser lets only digits through
# A batch this large would hold up other requests for more than about a millisecond.
_ROWS_IN_THREAD = 256
_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready|)/?")
_PREDICT = re.compile(r"/predict(?:/([^/]+))?/?")
_JSON: Headers = [(b"content-type", b"application/json")]
_LOG = logging.getLogger("fedward.serving")


class Disconnected(Exception):
    """The client left before its request was complete."""


class App:
    """The ASGI application over a catalogue of served models."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's request, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        headers = _JSON
        try:
            status, body, headers = await self._answer(scope, receive)
        except Disconnected:
            return
        except Problem as problem:
            status, body = problem.status, json.dumps(problem.to_json()).encode()
        except Exception as error:  # noqa: BLE001 (the last line before the network)
            # The type only: a message may quote a patient's values.
            _LOG.error("answering %s failed: %s", scope["method"], type(error).__name__)
            status, body = 500, b'{"error":"internal error; see the adapter\'s log"}'
        length = str(len(body)).encode()
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"content-length", length)],
            }
        )
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes, Headers]:
        path, method = scope["path"], scope["method"]
        if match := _MODEL.fullmatch(path):
            name, version, action = match.groups()
            if action == "/infer":
                _require(method, "POST")
                return await self._infer(self.catalogue.get(name, version), scope, receive)
            _require(method, "GET")
            return 200, self._model(self.catalogue.get(name, version), action), _JSON
        if match := _PREDICT.fullmatch(path):
            _require(method, "POST")
            live = self.catalogue.get(match[1])
            return 200, await self._predict(live, await _body(scope, receive)), _JSON
        return await self._server(path, method, scope, receive)

    async def _server(
        self, path: str, method: str, scope: Scope, receive: Receive
    ) -> tuple[int, bytes, Headers]:
        match path.rstrip("/"):
            case "/v2":
                value: Any = oip.server_metadata()
            case "/v2/health/live":
                value = {"live": True}
            case "/v2/health/ready":
                ready = bool(self.catalogue.names())
                _require(method, "GET")
                return (200 if ready else 503), _dump({"ready": ready, "live": True}), _JSON
            case "/v2/repository/index":
                _require(method, "POST")
                await _body(scope, receive)
                return 200, _dump(self._index()), _JSON
            case _:
                raise Problem(404, "no such path; see GET /v2, POST /predict")
        _require(method, "GET")
        return 200, _dump(value), _JSON

    def _model(self, live: Live, action: str) -> bytes:
        signature = live.signature
        if action == "/ready":
            return _dump({"name": signature.model, "ready": True})
        return _dump(oip.model_metadata(signature, [str(signature.version)]))

    def _index(self) -> list[dict[str, str]]:
        live = [self.catalogue.get(name) for name in self.catalogue.names()]
        return [
            {
                "name": served.signature.model,
                "version": str(served.signature.version),
                "state": "READY",
                "reason": "",
            }
            for served in live
        ]

    async def _infer(
        self, live: Live, scope: Scope, receive: Receive
    ) -> tuple[int, bytes, Headers]:
        body = await _body(scope, receive)
        length = _header(scope, b"inference-header-content-length")
        request = oip.parse_infer(body, length)
        outputs = await _predict(live, request.inputs)
        answer, json_length = oip.encode_infer(live.signature, request, outputs)
        if json_length is None:
            return 200, answer, _JSON
        return (
            200,
            answer,
            [
                (b"content-type", b"application/octet-stream"),
                (b"inference-header-content-length", str(json_length).encode()),
            ],
        )

    async def _predict(self, live: Live, body: bytes) -> bytes:
        values = clinical.parse_json(body)
        inputs = clinical.parse_patient(values, live.signature)
        outputs = await _predict(live, inputs)
        return _dump(clinical.answer(live.signature, inputs, outputs, privacy=live.privacy))


async def _predict(live: Live, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    if len(inputs) <= _ROWS_IN_THREAD:
        return live.predict(inputs)
    return await asyncio.to_thread(live.predict, inputs)


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The request's body, decompressed, within its limit. Raises `Problem` 400, 413 or 415."""
    declared = _header(scope, b"content-length") or b"0"
    if len(declared) > _LONGEST_LENGTH or int(declared) > MAX_BODY:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            raise _too_large()
        parts.append(part)
        if not message.get("more_body"):
            break
    return _decompress(b"".join(parts), _header(scope, b"content-encoding"))


def _decompress(body: bytes, encoding: bytes | None) -> bytes:
    if encoding is None or encoding == b"identity":
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise Problem(415, "content-encoding must be gzip, deflate or identity")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by its header
    try:
        plain = inflater.decompress(body, MAX_BODY + 1)
    except zlib.error:
        raise Problem(400, "the body is not what content-encoding says") from None
    if len(plain) > MAX_BODY:
        raise _too_large()
    if not inflater.eof:
        raise Problem(400, "the compressed body is cut short")
    return plain


def _too_large() -> Problem:
    return Problem(413, f"the body is larger than {MAX_BODY} bytes")


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def _require(method: str, allowed: str) -> None:
    if method != allowed and not (allowed == "GET" and method == "HEAD"):
        raise Problem(405, f"{method} is not allowed here; use {allowed}")


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
