"""What is watched, against river's streaming statistics.

river has no population stability index and no histogram of two streams: that index is held against
its sum by hand elsewhere. Its Kolmogorov-Smirnov distance is of raw values, as ours is where every
value has a bin of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fedward.serving.drift import Histogram, kolmogorov_smirnov
from fedward.serving.outcomes import brier, rates

_RIVER = """
import json, sys
from river import metrics, stats
asked = json.load(sys.stdin)
distance = stats.KolmogorovSmirnov(statistic="ks")
for pair in zip(asked["now"], asked["before"]):
    distance.update(*pair)
found = {"ks": distance.get()}
brier, recall, precision = metrics.MSE(), metrics.Recall(), metrics.Precision()
for truth, said in zip(asked["outcomes"], asked["probabilities"]):
    brier.update(float(truth), said)
    recall.update(truth, said >= 0.5)
    precision.update(truth, said >= 0.5)
json.dump({**found, "brier": brier.get(), "tpr": recall.get(), "ppv": precision.get()}, sys.stdout)
"""


def _river(**asked: Any) -> dict[str, float]:
    python = os.environ.get("FEDWARD_ORACLES_PYTHON")
    if python is None and importlib.util.find_spec("river") is None:
        pytest.skip("needs river: FEDWARD_ORACLES_PYTHON names a Python that has it")
    done = subprocess.run(
        [python or sys.executable, "-W", "ignore", "-c", _RIVER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("shift", [0.0, 0.4, 3.0])
def test_drift_calibration_and_rates_are_rivers(shift: float) -> None:
    rng = np.random.default_rng(int(shift * 10))
    before, now = rng.normal(size=400), rng.normal(shift, 1.3, size=400)
    probabilities = rng.random(400)
    outcomes = rng.random(400) < probabilities
    values = np.unique(np.concatenate([before, now]).astype(np.float32).astype(np.float64))
    edges = np.concatenate([[-100.0], (values[1:] + values[:-1]) / 2, [100.0]])
    bins = Histogram(edges, np.ones(len(values)) / len(values), 0.0)

    found = _river(
        now=now.tolist(),
        before=before.tolist(),
        outcomes=outcomes.tolist(),
        probabilities=probabilities.tolist(),
    )
    counts = [bins.count(one.astype(np.float32))[:-1] for one in (now, before)]
    ours = rates(probabilities >= 0.5, outcomes)

    assert kolmogorov_smirnov(counts[0], counts[1]) == pytest.approx(found["ks"], abs=1e-9)
    assert brier(probabilities, outcomes) == pytest.approx(found["brier"], abs=1e-9)
    assert ours["tpr"] == pytest.approx(found["tpr"], abs=1e-9)
    assert ours["ppv"] == pytest.approx(found["ppv"], abs=1e-9)
