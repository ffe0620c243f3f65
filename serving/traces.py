"""Spans of requests by OpenTelemetry, sent to the hospital's collector. Needs the extra `otel`.

A span has the route's name and the status: no path, no body, no patient. A caller's `traceparent`
is continued. Spans are sent by a thread in batches; what cannot be sent is dropped.
"""

import time
from collections.abc import Iterable
from typing import Any

from fedward import __version__
from fedward.core.errors import ConfigError

_TRACE_HEADERS = (b"traceparent", b"tracestate")


class Traces:
    """Sends a span for each request.

    Args:
        url: The collector's, such as `http://127.0.0.1:4318/v1/traces`.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, StatusCode
            from opentelemetry.trace.propagation.tracecontext import (
                TraceContextTextMapPropagator,
            )
        except ImportError as error:
            raise ConfigError(
                "needs OpenTelemetry; run: pip install fedward[otel]", file="--otlp"
            ) from error
        about = {"service.name": "fedward", "service.version": __version__}
        self._provider = TracerProvider(resource=Resource.create(about))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("fedward.serving", __version__)
        self._server, self._failed = SpanKind.SERVER, StatusCode.ERROR
        self._read = TraceContextTextMapPropagator().extract

    def answered(
        self, route: str, status: int, seconds: float, headers: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """A request was answered just now."""
        now = time.time_ns()
        carried = {
            name.decode(): value.decode("latin-1")
            for name, value in headers
            if name in _TRACE_HEADERS
        }
        span: Any = self._tracer.start_span(
            route,
            context=self._read(carried),
            kind=self._server,
            start_time=now - int(seconds * 1e9),
            attributes={"http.route": route, "http.response.status_code": status},
        )
        if status >= 500:  # noqa: PLR2004 (HTTP)
            span.set_status(self._failed)
        span.end(now)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()
