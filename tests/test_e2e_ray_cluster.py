"""A study on a Ray cluster that somebody else started, and what is said where there is none."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from studies import EPSILON_4, write_study
from test_simulate import model_of

from fedward.core.errors import ConfigError, RunError
from fedward.core.study import load_study
from fedward.simulations.ray import why_not
from fedward.simulations.simulate import prepare_run, simulate

pytestmark = pytest.mark.usefixtures("swept")

SCENARIO = """
[simulation]
engine = "per-site"
partition = "dirichlet"
args = { num_sites = 5, alpha = 5.0 }
malicious = { attack = "sign-flip", sites = 1 }
coordinator_crash = 2
evaluate_every = 1
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def study(folder: Path, resources: str) -> Path:
    extra = f"{SCENARIO}[simulation.resources]\n{resources}\n"
    return write_study(folder, privacy=EPSILON_4, rounds=2, extra=extra)


@pytest.fixture
def cluster() -> Iterator[str]:
    # The path of a socket has room for a hundred characters, fewer than pytest's folders.
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="ray"))
    ray = subprocess.Popen(
        [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *(f"--port={port}", "--num-cpus=2", "--include-dashboard=false"),
            *(
                f"--ray-client-server-port={free_port()}",
                "--disable-usage-stats",
                f"--temp-dir={folder}",
            ),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        until = time.monotonic() + 120
        while not list(folder.glob("session_latest/sockets/raylet*")):
            assert ray.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ray.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.e2e
def test_a_cluster_by_its_address_gives_the_bits_of_this_process(
    tmp_path: Path, cluster: str
) -> None:
    here, there = (
        study(tmp_path / "here", ""),
        study(tmp_path / "there", f'address = "{cluster}"\ncpus = 0.5'),
    )
    runs = [prepare_run(file, file.parent / "run") for file in (here, there)]

    alone = simulate(here, runs[0], runtime="in-process")
    spread = simulate(there, runs[1], runtime="ray")

    np.testing.assert_array_equal(model_of(runs[1]), model_of(runs[0]))
    assert spread["curve"] == alone["curve"]
    told = [
        [(e["event"], e.get("round"), e.get("site")) for e in run.events() if e["event"] in kinds]
        for run in runs
        for kinds in [{"attacked", "coordinator crashed"}]
    ]
    assert told[0] == told[1] != []


@pytest.mark.e2e
def test_a_cluster_with_less_than_a_site_needs_is_said_and_nothing_is_left(
    tmp_path: Path, cluster: str
) -> None:
    file = study(tmp_path, f'address = "{cluster}"\ncpus = 64.0')

    with pytest.raises(ConfigError, match=r"cpus = 64 for a site, and Ray has 2; ask for less"):
        simulate(file, prepare_run(file, tmp_path / "run"), runtime="ray")

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_nobody_is_is_said_at_once(tmp_path: Path, scheme: str) -> None:
    file = study(tmp_path, f'address = "{scheme}127.0.0.1:{free_port()}"')
    begun = time.monotonic()

    with pytest.raises(RunError, match=r"no Ray cluster answers at .*; start one with"):
        simulate(file, prepare_run(file, tmp_path / "run"), runtime="ray")

    assert time.monotonic() - begun < 30
    assert not (tmp_path / "run").exists()


def test_what_ray_says_of_an_address_is_one_line() -> None:
    error = RuntimeError(
        "Failed to connect.\nTraceback (most recent call last):\n  x\nNot found!\n\n"
    )

    said = why_not("127.0.0.1:10001", error)

    assert said.startswith(
        "Ray cannot be used at 127.0.0.1:10001: RuntimeError: Failed to connect."
    )
    assert "… Not found!; an address is host:port" in said
    assert "\n" not in said


@pytest.mark.parametrize("address", ["headnode", "", "http://head:6379", "head:port", "ray://head"])
def test_an_address_that_is_none_is_refused_with_its_line(tmp_path: Path, address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"toml:36: \[simulation.resources\] address .* host:port"
    ):
        load_study(study(tmp_path, f'address = "{address}"'))
