"""A minimal OCI registry on loopback (distribution-spec 1.1: pull and push), for tests."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_NAME = r"([a-z0-9._/\-]+)"
_BLOB = re.compile(rf"/v2/{_NAME}/blobs/(sha256:[0-9a-f]{{64}})")
_UPLOADS = re.compile(rf"/v2/{_NAME}/blobs/uploads/")
_UPLOAD = re.compile(rf"/v2/{_NAME}/blobs/uploads/(\d+)")
_MANIFEST = re.compile(rf"/v2/{_NAME}/manifests/([A-Za-z0-9._:\-]+)")
_KIND = "application/vnd.oci.image.manifest.v1+json"


@dataclass
class OciRegistry:
    """What it holds, open to be tampered with.

    Attributes:
        host: `127.0.0.1:PORT`.
        blobs: Content by digest, for all repositories.
        manifests: By repository and tag.
        asked: Method and path of every request.
        silent: Answer 503 to all.
        hanging: Take requests and answer nothing.
    """

    host: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    silent: bool = False
    hanging: bool = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: OciRegistry

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.registry.asked.append((self.command, path))
        while self.registry.hanging:
            time.sleep(0.05)
        if self.registry.silent:
            self._answer(503)
        elif self.command == "POST" and _UPLOADS.fullmatch(path):
            self._answer(202, Location=f"{path}{len(self.registry.asked)}")
        elif self.command == "PUT" and _UPLOAD.fullmatch(path):
            self._put_blob(body)
        elif found := _BLOB.fullmatch(path):
            content = self.registry.blobs.get(found[2])
            self._answer(404 if content is None else 200, content or b"")
        elif found := _MANIFEST.fullmatch(path):
            self._manifest(found[1], found[2], body)
        else:
            self._answer(404)

    def _put_blob(self, body: bytes) -> None:
        (digest,) = parse_qs(urlsplit(self.path).query)["digest"]
        if digest != "sha256:" + hashlib.sha256(body).hexdigest():
            self._answer(400)
            return
        self.registry.blobs[digest] = body
        self._answer(201, Location=self.path)

    def _manifest(self, name: str, tag: str, body: bytes) -> None:
        if self.command == "PUT":
            self.registry.manifests[name, tag] = body
            self._answer(201, Location=self.path)
            return
        content = self.registry.manifests.get((name, tag))
        self._answer(404 if content is None else 200, content or b"", Content_Type=_KIND)

    do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815 (names of http.server)


@contextmanager
def oci_registry() -> Iterator[OciRegistry]:
    """A registry in a thread of this process."""
    registry = OciRegistry()
    handler = type("Handler", (_Handler,), {"registry": registry})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    registry.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield registry
    finally:
        registry.hanging = False
        server.shutdown()
        thread.join()
        server.server_close()
