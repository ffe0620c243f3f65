"""Spans reach an OpenTelemetry collector, and hold nothing of a patient."""

import gzip
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from release_samples import publish_sample
from serving_client import adapter

from fedward.core.errors import ConfigError
from fedward.core.identity import Identity
from fedward.serving.store import Store
from fedward.serving.traces import Traces

_TRACE, _SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # W3C Trace Context's own


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            packed = self.headers.get("content-encoding") == "gzip"
            bodies.append(gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def _spans(bodies: list[bytes]) -> list[Any]:
    return [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def test_every_request_has_a_span_and_no_span_a_patient(
    collector: tuple[str, list[bytes]], tmp_path: Path
) -> None:
    url, bodies = collector
    identity = Identity.generate_publisher()
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", identity), identity.public)
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [63.25, 1, 240, 0]}
    with adapter(store.folder, tmp_path / "ready.json", "--otlp", url) as (address, process):
        carried = {"traceparent": f"00-{_TRACE}-{_SPAN}-01"}
        httpx.post(f"{address}/predict", json={"age": 63.25}, headers=carried)
        httpx.post(f"{address}/predict", json={"age": 17.25})
        httpx.post(f"{address}/v2/models/tiny/infer", json={"inputs": [tensor]})
        process.terminate()
        process.wait(30)

    spans = sorted(_spans(bodies), key=lambda span: int(span.end_time_unix_nano))
    facts = [{one.key: one.value for one in span.attributes} for span in spans]
    statuses = [fact["http.response.status_code"].int_value for fact in facts]
    assert [span.name for span in spans] == ["predict", "predict", "infer"]
    assert statuses == [200, 422, 200]
    assert all(set(fact) == {"http.route", "http.response.status_code"} for fact in facts)
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (_TRACE, _SPAN)
    assert spans[1].trace_id.hex() != _TRACE
    assert all(0 < s.end_time_unix_nano - s.start_time_unix_nano < 5e9 for s in spans)
    assert not any(value in body for body in bodies for value in (b"63.25", b"17.25"))


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    with pytest.raises(ConfigError, match=r"fedward\[otel\]"):
        Traces("http://127.0.0.1:1/v1/traces")
