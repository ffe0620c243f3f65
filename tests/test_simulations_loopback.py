"""What is started on loopback is stopped, and what Flower's programs say is understood."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedward.core.errors import RunError
from fedward.simulations.loopback import Loopback

_TOLD_TO_END = """
import signal
import sys
from pathlib import Path
import fedward.simulations.loopback as loopback
from fedward.core.run import RunDirectory
from fedward.simulations.provision import Provisioned

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs this may have been told not to hear it

def start(self):
    self._spawn("sleeper", "sleep", "600")
    print(self._processes["sleeper"].pid, flush=True)

loopback.Loopback._start = start
loopback.Loopback.submit = lambda self, config: None
sys.executable = "/bin/python"
folder = Path(sys.argv[1])
nowhere = Provisioned((), folder, folder, folder, folder)
loopback.run_on_loopback(nowhere, {}, run=RunDirectory(folder))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_is_told_to_end_stops_what_it_started(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", _TOLD_TO_END, str(tmp_path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        assert running.stdout is not None
        started = int(running.stdout.readline())

        running.send_signal(how)
        running.wait(30)

    until = time.monotonic() + 10
    while Path(f"/proc/{started}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    if how is not signal.SIGINT:
        assert running.returncode == 128 + how


_TOLD_WHILE_DEAF = """
import os, signal, time
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # what the signal raises here, nobody hears

def check(self):
    if self._processes:
        self._processes.pop("sleeper").kill()
        Deaf()
""" + _TOLD_TO_END.replace("sys.executable =", "loopback.Loopback.check = check\nsys.executable =")


def test_who_is_told_to_end_while_nothing_can_be_raised_ends_soon(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TOLD_WHILE_DEAF, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "Exception ignored" in done.stderr
    assert done.returncode == 128 + signal.SIGTERM


def test_an_answer_of_flower_that_says_it_failed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "flwr"
    program.write_text('#!/bin/sh\necho \'{"success": false, "error-message": "gone"}\'\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    with pytest.raises(RunError, match=r"flwr ls loopback failed: .*gone"):
        Loopback(tmp_path / "folder", []).ended()
