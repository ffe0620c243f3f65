"""Serve a store: verify, listen, say so, answer until stopped."""

import json
import socket
import sys
from pathlib import Path

import uvicorn

from fedward.core.files import write_atomic
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.inbox import install_inbox
from fedward.serving.store import Store

_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Uvicorn that says when it answers, and where."""

    def __init__(
        self, config: uvicorn.Config, *, address: tuple[str, int], ready: Path | None
    ) -> None:
        super().__init__(config)
        self._address, self._ready = address, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.should_exit:
            return
        host, port = self._address
        print(f"ready at http://{host}:{port}", file=sys.stderr, flush=True)
        if self._ready is not None:
            write_atomic(self._ready, json.dumps({"host": host, "port": port}) + "\n")


def serve(
    store: Store, host: str = "127.0.0.1", port: int = 8080, *, ready_file: Path | None = None
) -> None:
    """Verify the newest releases of a store and serve them until stopped by SIGINT or SIGTERM.

    Releases that wait in the store's inbox are installed first.

    Args:
        store: The hospital's store.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 takes a free one.
        ready_file: Gets `{"host": ..., "port": ...}` in one step, once requests are answered.

    Raises:
        ReleaseRejected: The store is empty, or what it serves does not verify.
        SignatureInvalid: A stored file changed since it was installed.
        OSError: The address cannot be listened on.
    """
    install_inbox(store)
    names = sorted(store.served())
    catalogue = Catalogue([store.newest(name) for name in names] or [store.newest()])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listener:
        address = (host, int(listener.getsockname()[1]))
        config = uvicorn.Config(
            App(catalogue),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=5,
        )
        _Server(config, address=address, ready=ready_file).run(sockets=[listener])
