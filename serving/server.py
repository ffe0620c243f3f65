"""Serve a store: verify, listen, say so, answer until stopped."""

import asyncio
import contextlib
import gc
import ipaddress
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from fedward.core.errors import ConfigError
from fedward.core.files import write_atomic
from fedward.serving.app import App
from fedward.serving.audit import AuditLog
from fedward.serving.catalogue import Catalogue
from fedward.serving.follower import NOT_YET, Follower
from fedward.serving.gate import Gate, read_keys
from fedward.serving.keysets import read_tokens
from fedward.serving.quick import QuickProtocol
from fedward.serving.service import Service
from fedward.serving.store import Store
from fedward.serving.tokens import Tokens
from fedward.serving.traces import Traces
from fedward.serving.vault import ROTATE_AFTER, Vault
from fedward.serving.watcher import Watcher

_BACKLOG = 2048
_PATIENCE = 2.0  # seconds that the start waits for a registry
_GRACE = 5  # seconds that requests under way have when the adapter stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to serve.

    Attributes:
        ready_file: Gets `{"host": ..., "port": ...}` in one step, once requests are answered.
        tls_certificate: PEM certificate chain; with `tls_key`, only HTTPS is answered.
        tls_key: PEM private key.
        keys: API keys; by default STORE/state/keys.json. With none of them, everybody who reaches
            the adapter may ask, which only loopback allows.
        look_every: Seconds between two looks at the store.
        rate: Requests a second that one caller may make over time.
        registry: A registry to follow through The Update Framework, its folder or the address of an
            OCI registry; None to wait for the inbox.
        root: The registry's pinned root of trust.
        fetch_every: Seconds between two looks at the registry.
        record_values: Whether patients' values go into the audit log, sealed; see `vault`.
        otlp: An OpenTelemetry collector that gets a span for each request.
        grpc_port: Where gRPC is answered, too; 0 takes a free one, None does without.
    """

    ready_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    keys: Path | None = None
    look_every: float = 0.25
    rate: float = 5000.0
    registry: Path | str | None = None
    root: Path | None = None
    fetch_every: float = 60.0
    grpc_port: int | None = None
    record_values: bool = False
    otlp: str | None = None


class _Server(uvicorn.Server):
    """Uvicorn that says when it answers and where, and looks after the store meanwhile."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        url: str,
        how: Options,
        service: Service,
        watcher: Watcher,
    ) -> None:
        super().__init__(config)
        self._url, self._how, self._service, self._watcher = url, how, service, watcher
        self._tasks: list[asyncio.Task[None]] = []
        self._rpc: Any = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.should_exit:
            return
        how = self._how
        self._tasks = [asyncio.create_task(self._watcher.run(every=how.look_every))]
        host, _, port = self._url.partition("://")[2].rpartition(":")
        address: dict[str, str | int] = {"host": host, "port": int(port), "url": self._url}
        also = ""
        if how.grpc_port is not None:
            from fedward.serving.rpc import start_rpc

            self._rpc, address["grpc_port"] = await start_rpc(
                self._service,
                f"{host}:{how.grpc_port}",
                certificate=how.tls_certificate,
                key=how.tls_key,
            )
            also = f", gRPC at {host}:{address['grpc_port']}"
        # What is there now stays: a collection need not look at it again.
        gc.collect()
        gc.freeze()
        print(f"ready at {self._url}{also}", file=sys.stderr, flush=True)
        if how.ready_file is not None:
            write_atomic(how.ready_file, json.dumps(address) + "\n")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stopping = True
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._rpc is not None:
            await self._rpc.stop(_GRACE)
        await super().shutdown(sockets=sockets)
        if self._service.traces is not None:
            await asyncio.to_thread(self._service.traces.close)


def serve(
    store: Store,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    ready_file: Path | None = None,
    options: Options | None = None,
) -> None:
    """Verify the newest releases of a store and serve them until stopped by SIGINT or SIGTERM.

    Releases that wait in the store's inbox are installed, at the start and from then on.

    Args:
        store: The hospital's store.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 takes a free one.
        ready_file: As in `Options`, which it goes before.
        options: How to serve.

    Raises:
        ReleaseRejected: The store is empty, or what it serves does not verify.
        SignatureInvalid: A stored file changed since it was installed.
        ConfigError: The keys are malformed, or the network would reach an adapter without keys.
        AuditCorrupt: The audit log was changed.
        OSError: The address cannot be listened on.
    """
    how = options or Options()
    state = store.folder / "state"
    keys = read_keys(how.keys or state / "keys.json")
    tokens = read_tokens(store.folder / "tokens.json")
    if not keys and tokens is None and not _is_loopback(host):
        raise ConfigError(
            f"has no API key and {host} can be reached from the network; make one with: "
            "python -m fedward.serving keys add --store DIR NAME ROLE",
            file=str(how.keys or state / "keys.json"),
        )
    catalogue = Catalogue([])
    vault = Vault(state) if how.record_values else None
    with AuditLog(state / "audit.jsonl", vault=vault) as audit:
        gate = Gate(keys, tokens=tokens, rate=how.rate)
        service = Service(catalogue, gate, audit=audit, store=store)
        service.state, service.vault = state, vault
        if how.otlp is not None:
            service.traces = Traces(how.otlp)
        follower = _follow(service, store, how)
        watcher = Watcher(
            store,
            catalogue,
            service.told,
            also=_chores(service, tokens),
        )
        if follower is not None:
            # An empty store has nothing to serve without the registry's answer.
            follower.start(patience=_PATIENCE if store.served() else None)
        watcher.look()
        if not catalogue.names():
            store.newest(next(iter(store.served()), None))  # says what is wrong
        try:
            ready = ready_file or how.ready_file
            _run(service, watcher, (host, port), replace(how, ready_file=ready))
        finally:
            if follower is not None:
                follower.stop()


def _run(service: Service, watcher: Watcher, address: tuple[str, int], how: Options) -> None:
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listener:
        scheme = "http" if how.tls_certificate is None else "https"
        config = uvicorn.Config(
            App(service),
            loop="uvloop",
            http=QuickProtocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            proxy_headers=False,  # nobody is judged by an address
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_GRACE,
            ssl_certfile=how.tls_certificate,
            ssl_keyfile=how.tls_key,
        )
        url = f"{scheme}://{host}:{listener.getsockname()[1]}"
        server = _Server(config, url=url, how=how, service=service, watcher=watcher)
        server.run(sockets=[listener])


def _follow(service: Service, store: Store, how: Options) -> Follower | None:
    """What brings newer releases from the registry, and says when its word is stale."""
    if how.registry is None:
        return None
    if how.root is None:
        raise ConfigError("is followed, so pin its root of trust too", file=str(how.registry))
    from fedward.serving.updates import follow, problem_of

    updates = follow(store, how.registry, how.root.read_bytes())

    def said(stale: str | None) -> None:
        if stale not in (None, NOT_YET, service.stale):
            service.alarms.append(str(stale))
        service.stale = stale

    return Follower(lambda: problem_of(updates), said, every=how.fetch_every)


def _chores(service: Service, tokens: Tokens | None) -> Callable[[], None]:
    """What keeps others' keys current, says what is wrong with them, and replaces our own."""

    def do() -> None:
        for problem in [] if tokens is None else tokens.refresh():
            if problem not in service.alarms:
                service.alarms.append(problem)
        if service.vault is not None:
            service.vault.rotate(after=ROTATE_AFTER)

    return do


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
