"""What tests share."""

import gc
import os
import signal
import warnings
from collections.abc import Iterator

import pytest

# Before torch is imported: two test runs on two cores must not fight over threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A shell starts what it puts in the background (`pytest &` in a script) deaf to Ctrl-C, and so
# would be every process that a test starts in order to stop it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def swept() -> Iterator[None]:
    """Ray leaves open files to the collector; what it finds in a later test is an error there."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
