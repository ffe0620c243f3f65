"""The real deployment on loopback: a SuperLink with TLS and node keys, a SuperNode a site.

Every part is a process of its own, started and stopped here. Both ends run with `--isolation
process` and a `flower-superexec` that knows a secret: with Flower's default isolation, whoever
reaches the port can start runs without credentials (tried on flwr 1.41).
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from fedward.core.errors import RunError
from fedward.core.files import write_atomic
from fedward.core.run import RunDirectory
from fedward.simulations.certificates import Certificates, make_certificates, make_node_key
from fedward.simulations.provision import Provisioned

_BUNDLE = """\
[project]
name = "fedward-settings"
version = "0.1.0"
description = "Settings only: every site runs the Fedward that it installed."
dependencies = []

[tool.flwr.app]
publisher = "fedward"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "fedward.server.app:app"
clientapp = "fedward.client.app:app"

[tool.flwr.app.config]
"""
_UP_WITHIN, _CLI_WITHIN, _SILENT_FOR = 60.0, 60.0, 1800.0
_LOOK_EVERY, _ASK_EVERY = 0.1, 15.0


def run_on_loopback(
    sites: Provisioned, config: Mapping[str, str | int | float | bool], *, run: RunDirectory
) -> None:
    """Run a study on a deployment that lives for this call.

    Raises:
        RunError: A process did not come up, or the run failed; names the log to look into.
    """
    folder = run.path.resolve() / "loopback"
    with _ended_in_order() as end_if_told, Loopback(folder, sites.sites) as deployment:
        deployment.submit(config)
        seen, until = 0, time.monotonic() + _SILENT_FOR
        ask_at = time.monotonic() + _ASK_EVERY
        while time.monotonic() < until:
            end_if_told()
            last = run.last_event()
            if last == "aborted":
                raise RunError(str(run.why_it_ended()))
            if last == "finished":
                return
            deployment.check()
            if (size := run.log_size) != seen:
                seen, until = size, time.monotonic() + _SILENT_FOR
            if time.monotonic() > ask_at:
                ask_at = time.monotonic() + _ASK_EVERY
                if deployment.ended() and run.last_event() != "finished":
                    logs = deployment.folder / "logs"
                    raise RunError(f"Flower ended the run without a result; see {logs}")
            time.sleep(_LOOK_EVERY)
        raise RunError(
            f"nothing happened in the run for {_SILENT_FOR:.0f} s; see {deployment.folder}, then "
            "go on with --resume"
        )


@contextmanager
def _ended_in_order() -> Iterator[Callable[[], None]]:
    """Let who is told to end (`kill`, a closed terminal) stop what it started, too.

    The processes are sessions of their own: nobody else would tell them.

    Yields:
        Ends the process if it was told to. Python throws away what a signal raises while it takes
        an object apart; who works on must ask.
    """
    told: list[int] = []

    def end_if_told() -> None:
        if told:
            raise SystemExit(128 + told[0])

    def end(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        end_if_told()

    if threading.current_thread() is not threading.main_thread():
        yield end_if_told  # the main thread alone may say what a signal does
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # not with nohup
            signal.signal(number, end)
    try:
        yield end_if_told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loopback:
    """A SuperLink and one SuperNode a site, as a context.

    Args:
        folder: For certificates, keys, logs and Flower's homes.
        sites: The site files.
    """

    def __init__(self, folder: Path, sites: Sequence[Path]) -> None:
        self.folder = folder
        self._sites = sites
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._run_id = ""

    def __enter__(self) -> Self:
        """Start everything; returns once all ports answer."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every process that was started, and its children."""
        self._stop()

    def submit(self, config: Mapping[str, str | int | float | bool]) -> None:
        """Start a run of the settings-only bundle.

        Raises:
            RunError: The SuperLink refused it.
        """
        bundle = self.folder / "bundle"
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
        write_atomic(bundle / "pyproject.toml", _BUNDLE + lines)
        write_atomic(bundle / "README.md", "Settings of a Fedward run; no code.\n")
        answer = self._flwr("run", str(bundle), "loopback", "--format", "json", gives="run-id")
        self._run_id = str(answer["run-id"])

    def ended(self) -> bool:
        """Whether Flower counts the run as finished."""
        asked = ("ls", "loopback", "--run-id", self._run_id, "--format", "json")
        answer = self._flwr(*asked, gives="runs")
        return str(answer["runs"][0]["status"]).startswith("finished")

    def check(self) -> None:
        """Raise `RunError` if a process has died."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RunError(
                    f"{name} ended with status {process.returncode}; see {self._log(name)}"
                )

    def _start(self) -> None:
        certificates = make_certificates(self.folder / "keys")
        self._port = _free_port()
        address = f"127.0.0.1:{self._port}"
        write_atomic(
            self._home("cli") / "config.toml",
            f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{address}"\n'
            f"root-certificates = {json.dumps(str(certificates.authority))}\n",
        )
        self._start_superlink(certificates, address)
        for number, site in enumerate(self._sites):
            self._start_supernode(certificates, address, number, site)

    def _start_superlink(self, certificates: Certificates, address: str) -> None:
        secret = self._secret("superlink")
        self._spawn(
            "superlink",
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--ssl-ca-certfile", str(certificates.authority)),
            *("--ssl-certfile", str(certificates.certificate)),
            *("--ssl-keyfile", str(certificates.key)),
            *("--database", str(self.folder / "superlink.sqlite")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        )
        self._wait_for(self._port, "superlink")
        self._spawn(
            "superlink-exec",
            "flower-superexec",
            *("--runtime-api-address", address),
            *("--root-certificates", str(certificates.authority)),
            *("--superexec-auth-secret-file", str(secret)),
            home="superlink",
        )

    def _start_supernode(
        self, certificates: Certificates, address: str, number: int, site: Path
    ) -> None:
        name = f"supernode-{number + 1}"
        key = self.folder / "keys" / name
        public = make_node_key(key)
        self._flwr("supernode", "register", str(public), "loopback", "--format", "json")
        secret = self._secret(name)
        port = _free_port()
        self._spawn(
            name,
            "flower-supernode",
            *("--superlink", address),
            *("--root-certificates", str(certificates.authority)),
            *("--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--node-config", f"site={json.dumps(str(site))}"),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        )
        self._wait_for(port, name)
        self._spawn(
            f"{name}-exec",
            "flower-superexec",
            *("--runtime-api-address", f"127.0.0.1:{port}", "--insecure"),
            *("--superexec-auth-secret-file", str(secret)),
            home=name,
        )

    def _secret(self, name: str) -> Path:
        path = self.folder / "keys" / f"{name}.secret"
        write_atomic(path, secrets.token_bytes(32), mode=0o600)
        return path

    def _home(self, name: str) -> Path:
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _environment(self, home: str) -> dict[str, str]:
        scripts = Path(sys.executable).parent
        return {
            **os.environ,
            "PATH": f"{scripts}:{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self._home(home)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def _spawn(self, name: str, program: str, *arguments: str, home: str | None = None) -> None:
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._processes[name] = subprocess.Popen(  # noqa: S603 (programs of our own environment)
                [str(Path(sys.executable).parent / program), *arguments],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self._environment(home or name),
                start_new_session=True,
            )

    def _flwr(self, *arguments: str, gives: str | None = None) -> dict[str, Any]:
        done = subprocess.run(  # noqa: S603 (a program of our own environment)
            [str(Path(sys.executable).parent / "flwr"), *arguments],
            capture_output=True,
            text=True,
            timeout=_CLI_WITHIN,
            env=self._environment("cli"),
            check=False,
        )
        start = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.loads(done.stdout[start:])
        except ValueError:
            answer = {}
        # It may end with 0 and say in its answer that it failed.
        if done.returncode or not answer or gives not in {None, *answer}:
            self.check()  # a process that died says more
            said = (done.stderr or done.stdout).strip()[-500:]
            raise RunError(f"flwr {' '.join(arguments[:2])} failed: {said}")
        return answer

    def _wait_for(self, port: int, name: str) -> None:
        until = time.monotonic() + _UP_WITHIN
        while time.monotonic() < until:
            self.check()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(_LOOK_EVERY)
            else:
                return
        raise RunError(f"{name} did not come up within {_UP_WITHIN:.0f} s; see {self._log(name)}")

    def _stop(self) -> None:
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes.values():
                if process.poll() is None or signal_number == signal.SIGKILL:
                    _signal_group(process.pid, signal_number)
            until = time.monotonic() + 5
            for process in self._processes.values():
                try:
                    process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        self._processes.clear()


def _signal_group(group: int, signal_number: int) -> None:
    try:
        os.killpg(group, signal_number)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
