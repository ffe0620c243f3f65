"""What privacy costs beside the training: noise, accounting, the ledger.

    python benchmarks/privacy_core.py [--quick] [--json]

Noise is compared with `torch.randn` in the same run; accounting with dp-accounting called directly.
All times are CPU times of one thread.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import torch
from dp_accounting.pld import PLDAccountant

from fedward.core.identity import Identity
from fedward.privacy.accounting import calibrate, compose, dp_sgd_event, privacy_spent
from fedward.privacy.accounting.pricing import GRID, clear_cache
from fedward.privacy.ledger import Ledger
from fedward.privacy.mechanisms import add_noise, secure_source

DELTA = 1e-5
DRAWS = 1 << 20


def seconds(action: Callable[[], object], *, repeats: int) -> float:
    """Median CPU time of an action."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def noise(repeats: int) -> dict[str, float]:
    """Nanoseconds a draw, big draws, one thread; both kinds interleaved."""
    torch.set_num_threads(1)
    source, vector = secure_source(), np.zeros(DRAWS, dtype=np.float32)
    actions: dict[str, Callable[[], object]] = {
        "torch.randn": lambda: torch.randn(DRAWS),
        "secure gaussian": lambda: source.gaussian(DRAWS, std=1.0),
        "add_noise": lambda: add_noise(vector, std=1.0, sensitivity=1.0, source=source),
        "secure uniform": lambda: source.uniform(DRAWS),
    }
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            taken[name].append(seconds(action, repeats=1))
    return {name: statistics.median(values) / DRAWS * 1e9 for name, values in taken.items()}


def one_more_round(repeats: int) -> float:
    """Milliseconds: a ledger of 1,000 rounds of ten studies, one more round, then epsilon."""
    clear_cache()
    studies = [
        dp_sgd_event(noise_multiplier=4.0 + number / 4, sample_rate=0.05, steps=10)
        for number in range(10)
    ]
    whole = compose(event for event in studies for _ in range(110))
    with Ledger.open(None, identity=Identity.generate_site(), site="va", simulated=True) as ledger:
        ledger.allot(study="all", event=whole, max_epsilon=1e3, delta=DELTA, unit="patient")
        for number in range(1000):
            ledger.reserve(study="all", round_number=number + 1, event=studies[number % 10])
        ledger.spent(DELTA)
        taken = []
        for number in range(repeats):
            start = time.process_time()
            ledger.reserve(study="all", round_number=1001 + number, event=studies[number % 10])
            ledger.spent(DELTA)
            taken.append(time.process_time() - start)
    return statistics.median(taken) * 1e3


def calibration() -> tuple[float, float, float]:
    """Seconds of ours and of dp-accounting's, and their difference."""
    clear_cache()
    question: dict[str, Any] = {"epsilon": 4.0, "delta": DELTA, "sample_rate": 0.05, "steps": 600}
    start = time.process_time()
    ours = calibrate(**question)
    middle = time.process_time()
    theirs = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(value_discretization_interval=GRID),
        lambda value: dp_sgd_event(noise_multiplier=value, sample_rate=0.05, steps=600),
        4.0,
        DELTA,
        dp_accounting.ExplicitBracketInterval(0.5, 20.0),
        tol=1e-4,
    )
    return middle - start, time.process_time() - middle, abs(ours - theirs)


def simulated_ledgers() -> float:
    """Seconds of reserve and settle of 4 simulated sites over 100 rounds."""
    identity = Identity.generate_site()
    part = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.05, steps=10)
    whole = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.05, steps=1000)
    total = 0.0
    for site in range(4):
        with Ledger.open(None, identity=identity, site=f"site-{site}", simulated=True) as ledger:
            ledger.allot(study="heart", event=whole, max_epsilon=1e3, delta=DELTA, unit="patient")
            start = time.process_time()
            for number in range(1, 101):
                reservation = ledger.reserve(study="heart", round_number=number, event=part)
                ledger.settle(reservation, update_digest="ab" * 32)
            total += time.process_time() - start
    return total


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    repeats = 9 if arguments.quick else 51
    privacy_spent(compose([]), delta=DELTA, unit="patient")  # imports are not measured
    drawn = noise(repeats)
    more = one_more_round(9 if arguments.quick else 30)
    ours, theirs, difference = calibration()
    ledgers = simulated_ledgers()
    share = drawn["torch.randn"] / drawn["add_noise"]
    bars = [
        {"name": "add_noise over torch.randn, throughput", "value": share, "bar": 1 / 3},
        {"name": "one more round on 1,000, ms", "value": more, "bar": 100.0},
        {"name": "calibration differs from dp-accounting", "value": difference, "bar": 1e-3},
        {"name": "4 simulated sites, 100 rounds, s", "value": ledgers, "bar": 1.0},
    ]
    for bar in bars:
        over = bar["name"] == "add_noise over torch.randn, throughput"
        bar["holds"] = bar["value"] >= bar["bar"] if over else bar["value"] <= bar["bar"]
    result = {
        "benchmark": "privacy_core",
        "nanoseconds_a_draw": drawn,
        "calibrate_seconds": ours,
        "calibrate_dp_accounting_seconds": theirs,
        "bars": bars,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in drawn.items():
            print(f"{name:>16} {value:6.1f} ns a draw")
        print(f"       calibrate {ours:6.2f} s, dp-accounting {theirs:.2f} s")
        for bar in bars:
            print(f"  {'ok  ' if bar['holds'] else 'MISS'} {bar['name']}: {bar['value']:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
