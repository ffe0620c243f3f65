"""How long a hospital takes to refuse a release that is wrong, and what it says.

Every way of issue 7: a flipped bit in any file, a wrong key, roll-back, freeze, mix-and-match, a
missing file, an extra file, a link, a path that leaves the folder, a pickle, an oversized file. The
bar is 20 ms, each; the reference is reading a good release in the same run.

    python benchmarks/refusals.py [--quick] [--json]

Every byte is hashed before anything is parsed, so the time grows with the release; the last line
shows by how much. A freeze is not refused: what serves goes on, and every answer says it is stale.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedward.core.canonical import digest
from fedward.core.errors import FedwardError
from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.core.modelsigning import sign_digests
from fedward.core.release import read_release, write_verified
from fedward.core.study import parse_study
from fedward.server.publisher import publish
from fedward.server.updates import found_registry, refresh_registry
from fedward.serving.store import Store
from fedward.serving.updates import Updates
from fedward.tasks.parameters import to_vector
from fedward.tasks.registry import get_task

BAR = 0.02
_LARGE = 64 * 2**20
_STUDY = """
[study]
name = "heart-disease"
task = "heart-disease"
rounds = 1
[model]
name = "mlp"
args = { hidden = 256 }
[training]
local_steps = 1
sample_rate = 0.5
learning_rate = 1.0
[privacy]
mode = "none"
acknowledge = "no privacy"
"""
_PUBLISHER = Identity.generate_publisher()
_ROOTS = [Identity.generate_publisher() for _ in range(3)]


@dataclass(frozen=True)
class Refused:
    """What one kind of wrong release met with.

    Attributes:
        seconds: Median.
        reason: What was said.
    """

    seconds: float
    reason: str


def make_release(registry: Path) -> Path:
    """The next version of a model with variants and a monitor."""
    study, task = parse_study(_STUDY), get_task("heart-disease")
    bins = {"edges": [0.0, 0.5, 1.0], "shares": [0.5, 0.5], "missing": 0.0}
    return publish(
        registry=registry,
        study=study,
        task=task,
        parameters=to_vector(task.model("mlp", **study.model.args)),
        fitted=None,
        privacy={"mode": "none", "simulated": False},
        metrics={},
        training={"sites": {}},
        identity=_PUBLISHER,
        monitor={"format": 1, "fields": {"age": bins}, "prediction": bins},
    )


def measure(act: Callable[[], object], *, repeats: int) -> Refused:
    """Median time of something that is refused, or says why it is stale."""
    times, reason = [], ""
    for _ in range(repeats):
        start = time.perf_counter()
        try:
            reason = str(act())
        except FedwardError as error:
            reason = str(error)
        times.append(time.perf_counter() - start)
    return Refused(statistics.median(times), reason)


def wrong_folders(good: Path, folder: Path) -> dict[str, Path]:
    """Copies of a good release, each wrong in one way."""
    made: dict[str, Path] = {}

    def copy(name: str) -> Path:
        made[name] = folder / str(len(made))
        shutil.copytree(good, made[name])
        return made[name]

    for path in sorted(p.relative_to(good).as_posix() for p in good.rglob("*") if p.is_file()):
        changed = copy(f"a flipped bit in {path}") / path
        content = bytearray(changed.read_bytes())
        content[len(content) // 2] ^= 1
        changed.write_bytes(content)
    (copy("a missing file") / "card.json").unlink()
    (copy("an extra file") / "notes.txt").write_text("x")
    link = copy("a link") / "card.json"
    link.unlink()
    link.symlink_to(good / "card.json")
    with (copy("an oversized file") / "card.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    files = {
        p.relative_to(good).as_posix(): p.read_bytes()
        for p in good.rglob("*")
        if p.is_file() and p.name != "model.sig"
    }
    digests = {path: digest(content) for path, content in files.items()}
    made["a path that leaves the folder"] = folder / "escape"
    escape = sign_digests({**digests, "../escape.json": "0" * 64}, name="m", identity=_PUBLISHER)
    write_verified(folder / "escape", files, escape)
    for name, path in (("by name", "model.pkl"), ("as weights", "model.safetensors")):
        pickled = {**files, path: b"\x80\x04\x95" + bytes(64)}
        signed = {one: digest(content) for one, content in pickled.items()}
        made[f"a pickle, {name}"] = folder / f"pickle {name}"
        bundle = sign_digests(signed, name="m", identity=_PUBLISHER)
        write_verified(folder / f"pickle {name}", pickled, bundle)
    return made


def follow(folder: Path, name: str) -> tuple[Path, Updates]:
    """A founded registry with one release, and a store that has followed it."""
    registry = folder / name / "registry"
    make_release(registry)
    found_registry(registry, roots=_ROOTS, threshold=2, publisher=_PUBLISHER)
    store = Store(folder / name / "store")
    write_atomic(store.folder / "trusted.pem", _PUBLISHER.public.pem())
    updates = Updates(store, registry, (registry / "tuf" / "1.root.json").read_bytes())
    updates.look()
    return registry, updates


def lying_registries(folder: Path) -> dict[str, Callable[[], object]]:
    """Registries that go back, stand still, or mix two states."""
    registry, updates = follow(folder, "back")
    shutil.copytree(registry / "tuf", folder / "old")
    make_release(registry)
    refresh_registry(registry, publisher=_PUBLISHER)
    updates.look()
    shutil.copytree(folder / "old", registry / "tuf", dirs_exist_ok=True)
    store, first = updates.store, registry / "heart-disease" / "1"
    acts: dict[str, Callable[[], object]] = {
        "a roll-back of the registry": updates.look,
        "a roll-back of the release": lambda: store.install(first, store.trusted()),
    }
    registry, updates = follow(folder, "frozen")
    refresh_registry(registry, publisher=_PUBLISHER, valid_days=-1)
    acts["a freeze (stale, goes on serving)"] = updates.look
    registry, updates = follow(folder, "mixed")
    old = (registry / "tuf" / "targets.json").read_bytes()
    make_release(registry)
    refresh_registry(registry, publisher=_PUBLISHER)
    (registry / "tuf" / "targets.json").write_bytes(old)
    acts["mix-and-match of metadata"] = updates.look
    registry, updates = follow(folder, "swapped")
    shutil.rmtree(make_release(registry))
    second = make_release(registry)
    refresh_registry(registry, publisher=_PUBLISHER)
    shutil.rmtree(second)
    make_release(registry)  # signed, but not what the metadata name
    acts["mix-and-match of releases"] = updates.look
    return acts


def large_release(good: Path, folder: Path) -> Path:
    """A release of 64 MiB with a bit flipped in its last byte."""
    files = {
        p.relative_to(good).as_posix(): p.read_bytes()
        for p in good.rglob("*")
        if p.is_file() and p.name != "model.sig"
    }
    files["model.onnx"] = np.random.default_rng(1).bytes(_LARGE)
    digests = {path: digest(content) for path, content in files.items()}
    write_verified(folder, files, sign_digests(digests, name="m", identity=_PUBLISHER))
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(_LARGE - 1)
        file.write(bytes([files["model.onnx"][-1] ^ 1]))
    return folder


def run(*, repeats: int) -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="fedward-refusals-") as name:
        folder = Path(name)
        good = make_release(folder / "good")
        trusted = _PUBLISHER.public
        reading = measure(lambda: read_release(good, trusted).label, repeats=repeats)
        found = {
            what: measure(partial(read_release, wrong, trusted), repeats=repeats)
            for what, wrong in wrong_folders(good, folder / "wrong").items()
        }
        stranger = Identity.generate_publisher().public
        found["a wrong key"] = measure(lambda: read_release(good, stranger), repeats=repeats)
        for what, act in lying_registries(folder).items():
            found[what] = measure(act, repeats=repeats)
        heavy = large_release(good, folder / "large")
        large = measure(lambda: read_release(heavy, trusted), repeats=3)
        size = sum(p.stat().st_size for p in good.rglob("*") if p.is_file())
    worst = max(found, key=lambda what: found[what].seconds)
    accepted = [what for what, one in found.items() if one.reason.startswith("Release(")]
    return {
        "release_bytes": size,
        "good_release_ms": 1e3 * reading.seconds,
        "large_release_ms": 1e3 * large.seconds,
        "refusals": {
            what: {
                "ms": round(1e3 * one.seconds, 3),
                "times_a_good_read": round(one.seconds / reading.seconds, 2),
                "reason": one.reason,
            }
            for what, one in found.items()
        },
        "bars": [
            {
                "name": f"slowest refusal ({worst}), ms",
                "value": round(1e3 * found[worst].seconds, 3),
                "bar": 1e3 * BAR,
                "holds": found[worst].seconds < BAR,
            },
            {
                "name": "wrong releases that were taken",
                "value": len(accepted),
                "bar": 0,
                "holds": not accepted,
            },
        ],
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="5 repeats")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = run(repeats=5 if arguments.quick else 25)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"a good release of {result['release_bytes'] / 1024:.0f} KiB is read in "
              f"{result['good_release_ms']:.2f} ms")  # fmt: skip
        for what, one in result["refusals"].items():
            ratio = one["times_a_good_read"]
            print(f"{one['ms']:8.2f} ms {ratio:6.2f} x  {what}: {one['reason'][:90]}")
        print(f"{result['large_release_ms']:8.2f} ms           a flipped bit in 64 MiB")
        for bar in result["bars"]:
            print(f"  {'ok  ' if bar['holds'] else 'FAIL'} {bar['name']}: {bar['value']}")
    return 0 if all(bar["holds"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
