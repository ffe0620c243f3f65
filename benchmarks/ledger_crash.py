"""Kill a site at every write, a thousand times, and see whether its ledger ever says too little.

A site lives, is killed by SIGKILL inside a system call that writes, and lives again on the same
ledger. The calls are counted and the kill is made by a library of thirty lines that is put in
front of the C library (LD_PRELOAD): before the n-th write, or after half of its bytes. What the
site did with patients and what it sent is reported through a pipe, which survives it.

    python benchmarks/ledger_crash.py [--quick] [--kills N] [--json]

Needs a C compiler. First each write of a whole life (a new ledger, allotment, round, close) is hit
in turn; then random ones, on a ledger that goes on.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedward.core.identity import Identity
from fedward.privacy.accounting import DpEvent, compose, dp_sgd_event, privacy_spent
from fedward.privacy.ledger import Ledger

DELTA = 1e-5
ROUNDS_A_LIFE = 2
_ALL_WRITES = 200  # with fewer kills than that, every fifth write of a life is hit
_PRELOADED = "FEDWARD_LEDGER_CRASH"
_BROKEN = "FEDWARD_LEDGER_CRASH_BROKEN"

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/types.h>
#include <unistd.h>
static long left = -1, seen = 0;
static int torn = 0;
void fault_arm(long n, int half) { left = n; torn = half; seen = 0; }
long fault_seen(void) { return seen; }
static int due(void) { seen++; return left > 0 && --left == 0; }
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }
#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define PART (torn ? count / 2 : 0)
ssize_t write(int fd, const void *data, size_t count) {
    REAL(write);
    if (due()) { if (PART) real(fd, data, PART); die(); } return real(fd, data, count); }
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    REAL(pwrite);
    if (due()) { if (PART) real(fd, data, PART, at); die(); } return real(fd, data, count, at); }
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    REAL(pwrite64);
    if (due()) { if (PART) real(fd, data, PART, at); die(); } return real(fd, data, count, at); }
int fsync(int fd) { REAL(fsync); if (due()) die(); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); if (due()) die(); return real(fd); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); if (due()) die(); return real(fd, size); }
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64); if (due()) die(); return real(fd, size); }
int unlink(const char *path) { REAL(unlink); if (due()) die(); return real(path); }
"""


@dataclass
class Seen:
    """What the world has seen of a site, across all its lives."""

    trained: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """What went wrong; all of it has to stay at nothing."""

    kills: int = 0
    lives: int = 0
    understated: int = 0
    trained_twice: int = 0
    unreadable: int = 0
    failed: int = 0


def round_event() -> DpEvent:
    """One round of training."""
    return dp_sgd_event(noise_multiplier=40.0, sample_rate=0.01, steps=5)


def live(path: Path, identity: Identity, report: int, *, whole: bool, broken: bool) -> None:
    """One life of a site; `report` is a pipe to those who see what it does.

    A `broken` site trains first and reserves after that.
    """
    with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
        ledger.allot(
            study="heart",
            event=dp_sgd_event(noise_multiplier=40.0, sample_rate=0.01, steps=50_000),
            max_epsilon=8.0,
            delta=DELTA,
            unit="patient",
        )
        for _ in range(1 if whole else ROUNDS_A_LIFE):
            done = len([entry for entry in ledger.entries() if entry.kind == "settle"])
            if broken:
                os.write(report, f"trained {ledger.entries()[-1].seq + 1}\n".encode())
            reservation = ledger.reserve(study="heart", round_number=done + 1, event=round_event())
            if not broken:
                os.write(report, f"trained {reservation.seq}\n".encode())
            os.write(report, f"sent {reservation.seq}\n".encode())
            ledger.settle(reservation, update_digest=f"{reservation.seq:064x}")
        if whole:
            ledger.close("heart", delta=DELTA)
        os.write(report, f"head {ledger.head}\n".encode())


def run_life(
    shim: ctypes.CDLL,
    path: Path,
    identity: Identity,
    seen: Seen,
    *,
    at: int,
    torn: bool,
    whole: bool,
) -> tuple[int, int]:
    """Fork a life that is killed at its `at`-th write. Returns its exit and its writes."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            shim.fault_arm(at, int(torn))
            live(path, identity, send, whole=whole, broken=_BROKEN in os.environ)
            status = 0
        finally:
            writes = shim.fault_seen()
            shim.fault_arm(-1, 0)
            os.write(send, f"writes {writes}\n".encode())
            os._exit(status)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        lines = pipe.read().decode().split("\n")
    _, status = os.waitpid(child, 0)
    writes = 0
    for line in lines[:-1]:  # what follows the last line's end was cut off by the kill
        word, value = line.split(" ")
        match word:
            case "trained":
                seen.trained.append(int(value))
            case "sent":
                seen.sent.append(int(value))
            case "head":
                seen.heads.append(value)
            case _:
                writes = int(value)
    return status, writes


def check(path: Path, identity: Identity, seen: Seen, tally: Tally, *, price: bool) -> None:
    """Compare the ledger with what was seen."""
    tally.trained_twice += len(seen.trained) - len(set(seen.trained))
    try:
        if tally.kills % 2 and seen.trained:  # who only looks comes upon a half-done write too
            Ledger.read(path, public=identity.public).shut()
        with Ledger.open(path, identity=identity, site="va", simulated=False) as ledger:
            reserved = {entry.seq for entry in ledger.entries() if entry.kind == "reserve"}
            tally.understated += len(set(seen.trained + seen.sent) - reserved)
            if price:
                ledger.verify()
                left = compose([round_event()] * len(set(seen.trained)))
                bound = privacy_spent(left, delta=DELTA, unit="patient").epsilon
                tally.understated += ledger.spent(DELTA).epsilon < bound - 1e-9
                for head in seen.heads[-1:]:
                    ledger.verify(against_head=head)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is counted and shown)
        print(f"after kill {tally.kills}: {error!r}", file=sys.stderr)
        tally.unreadable += 1


def count_end(status: int, tally: Tally) -> bool:
    """Take one life's end into the tally. Returns whether it was killed."""
    tally.lives += 1
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    tally.kills += killed
    tally.failed += not killed and status != 0
    return killed


def every_write(
    shim: ctypes.CDLL, folder: Path, identity: Identity, tally: Tally, *, stride: int
) -> int:
    """Hit each `stride`-th write of a whole life, and live again. Returns their number."""
    seen = Seen()
    status, writes = run_life(
        shim, folder / "whole.sqlite", identity, seen, at=-1, torn=False, whole=True
    )
    count_end(status, tally)
    for at in range(1, writes + 1, stride):
        path, seen = folder / f"{at}.sqlite", Seen()
        status, _ = run_life(shim, path, identity, seen, at=at, torn=at % 2 == 0, whole=True)
        count_end(status, tally)
        check(path, identity, seen, tally, price=at % 10 == 0)
        status, _ = run_life(shim, path, identity, seen, at=-1, torn=False, whole=False)
        count_end(status, tally)
        check(path, identity, seen, tally, price=False)
        path.unlink()
    return writes


def random_writes(
    shim: ctypes.CDLL,
    folder: Path,
    identity: Identity,
    tally: Tally,
    *,
    kills: int,
    tick: Callable[[], None],
) -> None:
    """Kill at random writes until there were `kills` kills in all."""
    rng = random.Random(7)
    path, seen, writes = folder / "0.sqlite", Seen(), 60
    number = 0
    while tally.kills < kills:
        at = rng.randint(1, writes + 5)
        status, counted = run_life(
            shim, path, identity, seen, at=at, torn=rng.random() < 0.5, whole=False
        )
        writes = counted or writes
        count_end(status, tally)
        last = tally.kills >= kills or number % 50 == 49
        check(path, identity, seen, tally, price=last)
        tick()
        number += 1
        if number % 100 == 0:  # a new site now and then, or replaying takes over
            path, seen = folder / f"{number}.sqlite", Seen()


def build(folder: Path) -> Path:
    """Compile the library, or explain."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("ledger_crash needs a C compiler (cc or gcc) on the path")
    source, library = folder / "fault.c", folder / "fault.so"
    source.write_text(SHIM)
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


def measure(kills: int, library: Path) -> dict[str, Any]:
    """Run everything under the library that is loaded already."""
    shim = ctypes.CDLL(str(library))
    shim.fault_arm.argtypes = [ctypes.c_long, ctypes.c_int]
    shim.fault_seen.restype = ctypes.c_long
    tally, identity, start = Tally(), Identity.generate_site(), time.perf_counter()
    privacy_spent(round_event(), delta=DELTA, unit="patient")  # imported once, for all lives
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        shown = sys.stderr.isatty()

        def tick() -> None:
            if shown:
                print(f"\r{tally.kills} kills", end="", file=sys.stderr)

        writes = every_write(
            shim, Path(name), identity, tally, stride=1 if kills >= _ALL_WRITES else 5
        )
        random_writes(shim, Path(name), identity, tally, kills=kills, tick=tick)
    bars = [
        {
            "name": "kills by SIGKILL",
            "value": tally.kills,
            "bar": kills,
            "holds": tally.kills >= kills,
        }
    ]
    for label, value in (
        ("ledger says less than what left", tally.understated),
        ("trained twice on one reservation", tally.trained_twice),
        ("ledger that cannot be continued", tally.unreadable),
        ("life that failed without a kill", tally.failed),
    ):
        bars.append({"name": label, "value": value, "bar": 0, "holds": value == 0})
    return {
        "benchmark": "ledger_crash",
        "writes_of_a_whole_life": writes,
        "lives": tally.lives,
        "seconds": round(time.perf_counter() - start, 1),
        "bars": bars,
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="200 kills")
    parser.add_argument("--kills", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--broken", action="store_true", help="a site that reserves after training: must fail"
    )
    arguments = parser.parse_args()
    kills = arguments.kills or (200 if arguments.quick else 1000)
    if _PRELOADED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = str(build(Path(folder)))
            environment = {**os.environ, "LD_PRELOAD": library, _PRELOADED: library}
            if arguments.broken:
                environment[_BROKEN] = "1"
            return subprocess.run(
                [sys.executable, *sys.argv], env=environment, check=False
            ).returncode
    result = measure(kills, Path(os.environ[_PRELOADED]))
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['lives']} lives, {result['writes_of_a_whole_life']} writes in a whole one")
        for bar in result["bars"]:
            print(f"  {'ok  ' if bar['holds'] else 'FAIL'} {bar['name']}: {bar['value']}")
    return 0 if all(bar["holds"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
