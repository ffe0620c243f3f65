"""The run directory: everything about one execution of a study, in one self-contained folder.

study.toml      the study as it was run
manifest.json   what it takes to repeat the run: versions, seed, study hash, data fingerprints
events.jsonl    what happened, a line each
checkpoints/    the newest rounds, to resume from
metrics.json    how it ended
release/        a copy of the published model
report.html
"""

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedward.core.errors import RunError
from fedward.core.files import write_atomic
from fedward.core.study import Study

_VERSIONED = ("fedward", "torch", "flwr", "opacus", "dp-accounting", "numpy", "scikit-learn")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run's folder.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, *, study_text: str) -> "RunDirectory":
        """Start a new run in `path`, a folder that is not there or is empty.

        Raises:
            RunError: `path` holds a run already or something else, or cannot be written.
        """
        if (path / "checkpoints").exists():
            raise RunError(
                f"{path} holds a run already; continue it with --resume, or choose another folder"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise RunError(f"{path} is not empty; choose another folder")
            (path / "checkpoints").mkdir()
            write_atomic(path / "study.toml", study_text)
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error.strerror or error}; choose another folder"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open a run that was started before.

        Raises:
            RunError: There is none.
        """
        if not (path / "study.toml").is_file():
            raise RunError(f"{path} is not a run directory: it has no study.toml")
        return cls(path)

    def discard(self) -> None:
        """Remove a run in which nothing was begun, so that its folder can be used again."""
        if not any(event["event"] == "started" for event in self.events()):
            shutil.rmtree(self.path)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to `events.jsonl`. Never holds a patient's data or a key."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind}
        text = json.dumps(line | fields, ensure_ascii=False) + "\n"
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(text)

    def events(self) -> Iterator[dict[str, Any]]:
        """Every complete event so far; a line that a crash cut short is left out."""
        file = self.path / "events.jsonl"
        if not file.exists():
            return
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    @property
    def log_size(self) -> int:
        """Bytes of `events.jsonl`: it grows when something happens."""
        file = self.path / "events.jsonl"
        return file.stat().st_size if file.exists() else 0

    def last_event(self) -> str | None:
        """The kind of the newest event."""
        last = list(self.events())[-1:]
        return str(last[0]["event"]) if last else None

    def why_it_ended(self) -> str | None:
        """Why the run ended without a result; None while it goes on, or once it is finished."""
        last = list(self.events())[-1:]
        return str(last[0]["reason"]) if last and last[0]["event"] == "aborted" else None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the run's JSON files, atomically."""
        write_atomic(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of the run's JSON files.

        Raises:
            RunError: It is not there, or is damaged.
        """
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path} has no {name}; the run has not come that far") from None
        except ValueError as error:
            raise RunError(f"{self.path / name} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.path / name} is damaged: not a JSON object")
        return value

    def adopt_release(self, release: Path) -> Path:
        """Copy a published release into the run, so that the folder is self-contained."""
        target = self.path / "release"
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(release, target)
        return target


def new_run_path(root: Path, study: Study) -> Path:
    """A fresh folder name below `root`: the time of start and the study's name."""
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    path = root / f"{stamp}-{study.study.name}"
    number = 2
    while path.exists():
        path = root / f"{stamp}-{study.study.name}-{number}"
        number += 1
    return path


def manifest(study: Study, *, data: Mapping[str, str], runtime: str) -> dict[str, Any]:
    """What it takes to repeat a run.

    Args:
        study: The study.
        data: A fingerprint of each site's data, by site; simulation only, as a fingerprint of
            real patients' data stays in the hospital.
        runtime: Which runtime it ran on.
    """
    versions = {name: _version(name) for name in _VERSIONED}
    return {
        "format": 1,
        "study": study.study.name,
        "study_hash": study.hash,
        "seed": study.study.seed,
        "runtime": runtime,
        "versions": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "data": dict(data),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
