"""The shorter way of an inference request: from the parser to the answer without a task.

An ASGI application is called in a task of its own, with two awaits for the body and two for the
answer; that costs more than a small model. A request that is whole, small and for inference waits
for nothing, so that it is answered where its last byte was parsed. All others, and all that is
unusual about a connection (pipelining behind an answer under way, a client that does not read,
`Expect`, chunks, HTTP/1.0), go the way of uvicorn's own protocol, of which this is a subclass.
"""

import time
from asyncio import TimerHandle
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from fedward.serving.app import App, answer_error
from fedward.serving.http import JSON_TYPE, Answer
from fedward.serving.roles import Caller
from fedward.serving.routes import PATIENT_HEADER, infer_now, infer_parts

# A body of this size is parsed, and its rows are run, in less than a millisecond.
MOST_BYTES = 16 * 1024
# These change how a body or a connection is read.
_UNUSUAL = {b"connection", b"transfer-encoding", b"upgrade", b"expect", b"content-encoding"}
_UNUSUAL |= {PATIENT_HEADER}  # whose values may be kept
_JSON_START = STATUS_LINE[200] + b"content-type: application/json\r\ncontent-length: "
_JSON_ONLY = (JSON_TYPE,)
_END = b"\r\n\r\n"
_MOST_KNOWN = 16  # heads of a connection, which differ in their length of body


@dataclass(frozen=True, slots=True)
class _Known:
    """A request's head that was parsed and chose the shorter way.

    A client that keeps its connection sends the same head again and again, and parsing it costs as
    much as the model. The same bytes, where a request begins, are the same head.

    Attributes:
        length: Of the body, which the head states.
        parts: As `infer_parts` found them.
        json_length: As in `infer_now`.
        headers: As parsed.
        caller: Whom they admitted.
    """

    length: int
    parts: tuple[str | None, ...]
    json_length: bytes | None
    headers: list[tuple[bytes, bytes]]
    caller: Caller


class QuickProtocol(HttpToolsProtocol):
    """One connection. `config.app` must be an `App`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        app = self.config.app
        if not isinstance(app, App):
            raise TypeError("the application is no adapter")
        self._adapter = app
        self._body: list[bytes] | None = None  # of a request on the shorter way
        self._parts: tuple[str | None, ...] = ()
        self._caller: Caller | None = None
        self._known: dict[bytes, _Known] = {}  # by head
        self._within = False  # between a message's first byte and its last
        self._quick = 0  # requests that were answered on the shorter way
        self._json_length: bytes | None = None
        self._begun = self._stopping = False
        self._timer: TimerHandle | None = None
        self._answered = 0.0
        self._length = 0

    def data_received(self, data: bytes) -> None:
        """Answer at once what has the same head as the request before; else parse."""
        if not self._at_rest():
            super().data_received(data)
            return
        end = data.find(_END) + len(_END)
        known = self._known.get(data[:end])
        if known is not None and len(data) == end + known.length:
            self._unset_keepalive_if_required()
            self._parts, self._json_length = known.parts, known.json_length
            self.headers, self._caller = known.headers, known.caller
            self._answer(data[end:])
            return
        self._caller, answered = None, self._quick
        super().data_received(data)
        if self._quick == answered + 1 and self._at_rest():
            self._learn(data, end)
        else:
            self._known.clear()

    def _learn(self, data: bytes, end: int) -> None:
        """Remember a head, if `data` was one request, whole, and nothing else."""
        if self._caller is None or len(data) != end + self._length:
            return
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[data[:end]] = _Known(
            self._length, self._parts, self._json_length, self.headers, self._caller
        )

    def _at_rest(self) -> bool:
        """Whether the next byte begins a request, and it may be answered at once."""
        before: RequestResponseCycle | None = self.cycle
        idle = before is None or before.response_complete
        return idle and not (
            self._within or self._stopping or self.pipeline or self.flow.write_paused
        )

    def on_message_begin(self) -> None:
        """Without ASGI's scope, which only the other way needs."""
        self._begun = self._within = True
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """Choose the way."""
        if self._is_quick():
            self._body = []
        else:
            self._begun = False  # from here on the cycle says so
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers.extend(headers)  # the scope holds this list
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        if self._body is None:
            super().on_body(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """Answer, on the shorter way."""
        self._within = False
        if self._body is None:
            super().on_message_complete()
            return
        body, self._body = b"".join(self._body), None
        self._quick += 1
        self._caller = None
        self._length = len(body)
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        start = time.perf_counter()
        try:
            answer, self._caller = infer_now(
                self._adapter.service,
                self._parts,
                self.headers,
                body,
                self._json_length,
                before=self._caller,
            )
        except Exception as error:  # noqa: BLE001 (the last line before the network)
            answer = answer_error("infer", error)
        self._write(answer)
        self._adapter.service.answered(
            "infer", answer.status, time.perf_counter() - start, self.headers
        )
        self.server_state.total_requests += 1
        if self._stopping:
            self.transport.close()
        else:
            self._rest()

    def shutdown(self) -> None:
        """As uvicorn's: close once what is under way is answered."""
        if self._body is None:
            super().shutdown()
        else:
            self._stopping = True

    def _rest(self) -> None:
        """Wait for the next request, as long as a connection is kept.

        One timer for many requests: it is set again when it is due, not at each of them.
        """
        self._begun = False
        self._answered = self.loop.time()
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self._due)

    def _due(self) -> None:
        self._timer = None
        left = self._answered + self.timeout_keep_alive - self.loop.time()
        before: RequestResponseCycle | None = self.cycle
        if self._begun or (before is not None and not before.response_complete):
            return  # under way: its end sets a timer
        if left > 0:
            self._timer = self.loop.call_later(left, self._due)
        elif self.timeout_keep_alive_task is None:  # else uvicorn's own is the later one
            self.timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connection_lost(exc)

    def _is_quick(self) -> bool:
        parts = infer_parts(self.url)
        if parts is None or self.parser.get_method() != b"POST":
            return False
        before: RequestResponseCycle | None = self.cycle
        idle = before is None or before.response_complete
        if not idle or self.pipeline or self.flow.write_paused:
            return False
        length, self._json_length = b"", None
        for name, value in self.headers:
            if name in _UNUSUAL:
                return False
            if name == b"content-length":
                length = value
            elif name == b"inference-header-content-length":
                self._json_length = value
        self._parts = parts
        return (
            0 < len(length) <= len(str(MOST_BYTES))
            and int(length) <= MOST_BYTES
            and self.parser.get_http_version() == "1.1"
        )

    def _write(self, answer: Answer) -> None:
        length = str(len(answer.body)).encode()
        if answer.status == 200 and answer.headers == _JSON_ONLY:  # noqa: PLR2004 (HTTP)
            self.transport.write(b"".join((_JSON_START, length, b"\r\n\r\n", answer.body)))
            return
        parts = [STATUS_LINE[answer.status]]
        for name, value in (*answer.headers, (b"content-length", length)):
            parts += (name, b": ", value, b"\r\n")
        self.transport.write(b"".join((*parts, b"\r\n", answer.body)))
