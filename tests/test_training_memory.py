import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import numpy as np
from fedward.client.training.memory import keep_freed_memory

if {kept}:
    keep_freed_memory()
for turn in range(6):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(400_000) for _ in range(8)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library's memory")
def test_the_memory_that_a_step_frees_is_there_for_the_next() -> None:
    def faults(*, kept: bool) -> int:
        code = STEPS.format(kept=kept)
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    # Four steps of 25 MB are 25,000 pages of 4 KiB; a system that gives large ones faults less.
    assert faults(kept=True) < min(200, faults(kept=False))
