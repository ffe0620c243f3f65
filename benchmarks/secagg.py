"""Secure aggregation: how fast, how large, how thoroughly explored.

For n = 10 sites and d parameters: (a) the raw cipher stream, (b) a plain float32 sum, (c) the
primitives of Flower 1.41's SecAgg+, (d) ours. All in one process and in turns, so that a busy
machine hits all of them alike: each figure is the median over the turns, each ratio the median of
the turns' ratios. One core means CPU seconds of the one thread at work; two cores means seconds on
the wall.

    python benchmarks/secagg.py [--quick] [--json]
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream
from fedward.privacy.secagg import SiteSession, choose_degree, shamir
from fedward.privacy.secagg.exploration import Explorer
from fedward.privacy.secagg.fuzzing import fuzz
from fedward.privacy.secagg.masks import CHUNK_BYTES, Mask, apply_masks
from fedward.privacy.secagg.rounds import agree, make_sessions

SITES = 10
CLIP = 8.0


def _wall(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def clock(threads: int) -> float:
    """Seconds: of this thread's work, or on the wall if others work too."""
    return time.thread_time() if threads == 1 else time.perf_counter()


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of an action of one thread."""
    start = clock(1)
    action()
    return clock(1) - start


class Turns:
    """Seconds of several actions, each of them once in a turn."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """What an action took in this turn."""
        self._seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self._seconds[name])

    def ratio(self, name: str, over: str) -> float:
        """The median of one action's seconds over another's of the same turn."""
        pairs = zip(self._seconds[name], self._seconds[over], strict=True)
        return statistics.median(one / other for one, other in pairs)


def raw_streams(key: bytes, size: int) -> None:
    """As many streams as a site makes, in the same chunks, into a buffer that is thrown away."""
    zeros, buffer = memoryview(bytes(CHUNK_BYTES)), bytearray(CHUNK_BYTES + 15)
    for _ in range(SITES):
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        for at in range(0, size, CHUNK_BYTES):
            stream.update_into(zeros[: size - at], buffer)


def flower_client(update: np.ndarray) -> list[np.ndarray]:
    """What Flower's client does to its update, with Flower's functions."""
    vector = parameters_addition(
        quantize([update], CLIP, 1 << 22),
        pseudo_rand_gen(os.urandom(32), 1 << 32, [update.shape]),
    )
    for _ in range(SITES - 1):
        vector = parameters_addition(
            vector, pseudo_rand_gen(os.urandom(32), 1 << 32, [update.shape])
        )
    return parameters_mod(vector, 1 << 32)


class Ours:
    """Ten sites and a coordinator at work on vectors of `length`."""

    def __init__(self, length: int, threads: int) -> None:
        self.coordinator, self.sites = make_sessions(SITES, length=length, threads=threads)
        agree(self.coordinator, self.sites)
        self.names = sorted(self.sites)
        self.fixed = FixedPoint.choose(bound=CLIP, sites=SITES, length=length)
        self.bits = BitStream.secure()
        self.number = 0
        self.threads = threads

    def open(self) -> None:
        """Open a new round at every site."""
        self.number += 1
        for name, request in self.coordinator.shares_request(self.number).items():
            self.coordinator.add_shares(name, self.sites[name].shares(request))
        for name, request in self.coordinator.open_round(self.number).items():
            self.sites[name].begin(request)

    def mask(self, site: SiteSession, update: np.ndarray) -> memoryview:
        """Encode and mask."""
        return site.mask_filled(
            lambda out: self.fixed.encode(update, bits=self.bits, out=out, threads=self.threads)
        )

    def site(self, update: np.ndarray) -> tuple[float, memoryview]:
        """Seconds of one site's whole masking: encoding, masks, message."""
        self.open()
        start = clock(self.threads)
        message = self.mask(self.sites[self.names[0]], update)
        return clock(self.threads) - start, message

    def round(self, update: np.ndarray, *, dropouts: int) -> float:
        """Seconds of the coordinator's work in a round; the sum is checked."""
        self.open()
        alive = self.names[dropouts:]
        encoded = [self.fixed.encode(update, bits=self.bits) for _ in alive]
        messages = [
            self.sites[name].mask(vector) for name, vector in zip(alive, encoded, strict=True)
        ]
        plain = np.zeros(update.size, np.uint32)
        for vector in encoded:
            plain += vector
        del encoded
        start = clock(self.threads)
        for name, message in zip(alive, messages, strict=True):
            self.coordinator.add_update(name, message)
        requests = self.coordinator.close_updates()
        spent = clock(self.threads) - start
        confirmations = {name: self.sites[name].confirm(data) for name, data in requests.items()}
        start = clock(self.threads)
        for name, reply in confirmations.items():
            self.coordinator.add_confirmation(name, reply)
        requests = self.coordinator.unmask_requests()
        spent += clock(self.threads) - start
        replies = {name: self.sites[name].unmask(requests[name]) for name in alive}
        start = clock(self.threads)
        for name, reply in replies.items():
            self.coordinator.add_unmasking(name, reply)
        result = self.coordinator.finish()
        spent += clock(self.threads) - start
        if not np.array_equal(result.total, plain):
            raise SystemExit("the sum is wrong")
        return spent


def measure(length: int, *, repeats: int) -> dict[str, float]:
    """All figures for vectors of `length`."""
    size = 4 * length
    update = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    floats = [update.copy() for _ in range(SITES)]
    vector = np.zeros(length, np.uint32)
    key = os.urandom(32)
    masks = [Mask(os.urandom(32), subtract=bool(k % 2)) for k in range(SITES)]

    def plain() -> None:
        total = np.zeros(length, np.float32)
        for one in floats:
            total += one

    turns = Turns()
    actions: dict[str, Callable[[], object]] = {
        "add": lambda: np.add(vector, vector, out=vector),
        "cipher": lambda: raw_streams(key, size),
        "one_mask": lambda: apply_masks(vector, masks[:1], threads=1),
        "masks": lambda: apply_masks(vector, masks, threads=1),
        "plain_sum": plain,
        "flower": lambda: flower_client(update),
    }
    alone, shared = Ours(length, 1), Ours(length, 2)
    for turn in range(repeats + 1):
        found = {name: seconds(action) for name, action in actions.items()}
        found["site"], message = alone.site(update)
        message_bytes = len(message)
        del message
        found["coordinator"] = alone.round(update, dropouts=0)
        found["recovery"] = alone.round(update, dropouts=1) - found["coordinator"]
        found["flower_wall"] = _wall(actions["flower"])
        found["site_wall"], _ = shared.site(update)
        found["plain_sum_wall"] = _wall(plain)
        found["coordinator_wall"] = shared.round(update, dropouts=0)
        for name, value in found.items() if turn else ():  # the first turn warms up
            turns.add(name, value)
    return {
        "d": length,
        "plain_sum_s": turns.median("plain_sum"),
        "add_gbs": size / turns.median("add") / 1e9,
        "cipher_gbs": SITES * size / turns.median("cipher") / 1e9,
        "generate_and_add_gbs": SITES * size / turns.median("masks") / 1e9,
        "generate_and_add_one_stream_gbs": size / turns.median("one_mask") / 1e9,
        "generate_and_add_over_cipher": turns.ratio("cipher", "masks"),
        "flower_site_s": turns.median("flower"),
        "site_one_core_s": turns.median("site"),
        "site_two_cores_s": turns.median("site_wall"),
        "flower_over_one_core": turns.ratio("flower", "site"),
        "flower_over_two_cores": turns.ratio("flower_wall", "site_wall"),
        "bytes_a_parameter": message_bytes / length,
        "coordinator_one_core_s": turns.median("coordinator"),
        "coordinator_two_cores_s": turns.median("coordinator_wall"),
        "coordinator_one_core_plain_sums": turns.ratio("coordinator", "plain_sum"),
        "coordinator_two_cores_plain_sums": turns.ratio("coordinator_wall", "plain_sum_wall"),
        "recovery_one_core_s": turns.median("recovery"),
        "recovery_over_masking": turns.ratio("recovery", "site"),
    }


def shamir_ms() -> dict[str, float]:
    """Splitting and rebuilding one secret of 32 bytes for 50 sites, threshold 34."""
    secret, points = bytes(31) + b"\x05", range(1, 51)
    key = os.urandom(32)
    shares = shamir.split(secret, threshold=34, points=points, key=key)
    theirs = create_shares(secret, 34, 50)
    turns = Turns()
    for _ in range(5):
        # On the wall: Flower's sharing runs on threads of its own.
        for name, action in {
            "ours_split": lambda: shamir.split(secret, threshold=34, points=points, key=key),
            "ours_combine": lambda: shamir.combine(shares[:34], shamir.weights(points[:34])),
            "flower_split": lambda: create_shares(secret, 34, 50),
            "flower_combine": lambda: combine_shares(theirs[:34]),
        }.items():
            turns.add(name, _wall(action))
    names = ("ours_split", "ours_combine", "flower_split", "flower_combine")
    return {f"{name}_ms": 1e3 * turns.median(name) for name in names}


def explored(*, quick: bool) -> list[dict[str, object]]:
    """What the walks over the state machines saw."""
    walks = [(3, 0, 1), (3, 1, 1), (3, 0, 2), (4, 1, 1)] + ([] if quick else [(4, 0, 1)])
    found: list[dict[str, object]] = []
    for count, dishonest, rounds in walks:
        walk = Explorer(count, dishonest=dishonest, rounds=rounds).walk()
        found.append(
            {
                "sites": count,
                "dishonest": dishonest,
                "rounds": rounds,
                "states": walk.states,
                "messages": walk.messages,
                "violation": walk.violation,
            }
        )
    return found


def degrees() -> list[dict[str, float]]:
    """The graphs for more sites than 64: 10 % dishonest, 10 % dropped out."""
    found = []
    for sites in (100, 200, 500, 1000):
        degree = choose_degree(sites)
        found.append(
            {
                "sites": sites,
                "neighbors": degree.neighbors,
                "threshold": degree.threshold,
                "collusion_log2": round(degree.collusion, 1),
                "failure_log2": round(degree.failure, 1),
            }
        )
    return found


def bar(name: str, value: float, limit: float, *, at_least: bool) -> dict[str, object]:
    """One bar and whether it holds."""
    holds = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return {"name": name, "value": round(value, 4), "bar": f"{sign} {limit:g}", "holds": holds}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)
        else:
            print(text, file=sys.stderr)

    sizes = (10**5, 10**7) if options.quick else (10**5, 10**6, 10**7)
    rows = []
    for length in sizes:
        row = measure(length, repeats=3 if options.quick else 9)
        rows.append(row)
        say(f"\nd = {length:.0e}, n = {SITES}")
        for name, value in row.items():
            say(f"  {name:36s} {value:12.5g}")
    top = rows[-1]
    sharing = shamir_ms()
    say(
        "\nShamir, 50 sites, threshold 34: " + ", ".join(f"{k} {v:.3g}" for k, v in sharing.items())
    )
    walks = explored(quick=options.quick)
    for walk in walks:
        say(f"explored {walk}")
    cases = 10_000 if options.quick else 100_000
    fuzzed = dict(fuzz(cases, rng=random.Random(1)))
    say(f"fuzzed {cases}: {fuzzed}")
    graphs = degrees()
    for graph in graphs:
        say(f"graph {graph}")
    bars = [
        bar("generate-and-add over the cipher's raw rate",
            top["generate_and_add_over_cipher"], 0.7, at_least=True),
        bar("a site's masking faster than Flower's, one core",
            top["flower_over_one_core"], 6.5, at_least=True),
        bar("a site's masking faster than Flower's, two cores",
            top["flower_over_two_cores"], 10, at_least=True),
        bar("bytes a parameter", top["bytes_a_parameter"], 4.01, at_least=False),
        bar("recovery of one dropout over masking",
            top["recovery_over_masking"], 1, at_least=False),
        bar("coordinator in plain sums, one core",
            top["coordinator_one_core_plain_sums"], 3.5, at_least=False),
        bar("violations found by exploration",
            sum(walk["violation"] is not None for walk in walks), 0, at_least=False),
    ]  # fmt: skip
    for one in bars:
        say(f"{'holds ' if one['holds'] else 'MISSED'} {one['name']}: {one['value']} {one['bar']}")
    if options.json:
        report = {
            "sizes": rows,
            "shamir": sharing,
            "exploration": walks,
            "fuzzed": {"cases": cases, **fuzzed},
            "graphs": graphs,
            "bars": bars,
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
