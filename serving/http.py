"""Bytes of HTTP over ASGI: bodies within their limits, and answers."""

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fedward.serving.problems import Problem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY = 8 * 2**20
_LONGEST_LENGTH = 18  # digits; the HTTP parser lets only digits through
JSON_TYPE = (b"content-type", b"application/json")


class Disconnected(Exception):
    """The client left before its request was complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its body, and what differs from 200 and JSON."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = (JSON_TYPE,)


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that goes on: parts of its body, as they come."""

    parts: AsyncGenerator[bytes, None]
    headers: tuple[tuple[bytes, bytes], ...]


def answer_json(value: Any, *, status: int = 200) -> Answer:
    """An answer of JSON."""
    return Answer(json.dumps(value).encode(), status)


async def send_answer(send: Send, answer: Answer) -> None:
    """Send it."""
    length = (b"content-length", str(len(answer.body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [*answer.headers, length],
        }
    )
    await send({"type": "http.response.body", "body": answer.body})


async def send_stream(receive: Receive, send: Send, stream: Stream) -> None:
    """Send parts until there are no more, or the client has left."""
    headers = list(stream.headers)
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    left = asyncio.ensure_future(_left(receive))
    try:
        async for part in stream.parts:
            if left.done():
                break
            await send({"type": "http.response.body", "body": part, "more_body": True})
    finally:
        left.cancel()
        await stream.parts.aclose()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The request's body, decompressed.

    Raises:
        Problem: 400 malformed, 413 too large, 415 unknown compression.
        Disconnected: The client left.
    """
    declared = header(scope["headers"], b"content-length") or b"0"
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
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    return _decompress(body, header(scope["headers"], b"content-encoding"))


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first header of this name, in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return None


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
