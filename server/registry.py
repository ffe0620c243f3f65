"""The registry: a folder of releases, `MODEL/VERSION/`, whole or not there."""

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedward.core.files import alone_in, sync_folder
from fedward.core.identity import Identity
from fedward.core.release import limit_of, valid_name, write_release

TUF = "tuf"
"""Folder of The Update Framework's metadata. What is in it has no version's name."""

FIRST_ROOT = "1.root.json"


@dataclass(frozen=True, slots=True)
class Listed:
    """A release as its folder says, not verified.

    Attributes:
        model: Its name.
        version: From 1.
        date: When it was written, UTC, as in 2026-03-01T12:00:00Z.
        privacy: The one line of `privacy.json`; None where the file does not have it.
    """

    model: str
    version: int
    date: str
    privacy: str | None


@dataclass(frozen=True, slots=True)
class Registry:
    """A folder of releases. Versions of a model are 1, 2, 3, ..., and never used again.

    Args:
        folder: Made when the first release is added.
    """

    folder: Path

    def versions(self, model: str) -> tuple[int, ...]:
        """The versions of `model`, in order."""
        try:
            names = [path.name for path in (self.folder / model).iterdir()]
        except FileNotFoundError:
            return ()
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    def models(self) -> tuple[str, ...]:
        """Names of all models, in order."""
        if not self.folder.is_dir():
            return ()
        found = (p.name for p in self.folder.iterdir() if p.is_dir() and valid_name(p.name))
        return tuple(sorted(found))

    @property
    def founded(self) -> bool:
        """Whether it has a root of trust, so that hospitals may follow it."""
        return (self.folder / TUF / FIRST_ROOT).exists()

    def listing(self) -> list[Listed]:
        """Every release, by model and version."""
        found = []
        for model in self.models():
            for version in self.versions(model):
                folder = self.path(model, version)
                written = datetime.fromtimestamp(folder.stat().st_mtime, tz=UTC)
                date = written.strftime("%Y-%m-%dT%H:%M:%SZ")
                found.append(Listed(model, version, date, _privacy_line(folder)))
        return found

    def path(self, model: str, version: int) -> Path:
        """Where a release is."""
        return self.folder / model / str(version)

    def add(
        self, model: str, build: Callable[[int], Mapping[str, bytes]], *, identity: Identity
    ) -> Path:
        """Publish the next version of `model`.

        The release is written under a temporary name, flushed, and renamed: a reader sees all of
        it or nothing, and a crash leaves at most a hidden folder that the next call removes.

        Args:
            model: The model's name.
            build: Makes the files of the version that it is given.
            identity: Signs; ECDSA P-256.

        Returns:
            The release's folder.

        Raises:
            ValueError: The name, the files or the identity are not what a release takes.
        """
        if not valid_name(model):
            raise ValueError(f"{model!r} cannot name a model: lower-case letters, digits, hyphens")
        shelf = self.folder / model
        shelf.mkdir(parents=True, exist_ok=True)
        with alone_in(shelf):
            for leftover in shelf.glob(".*.tmp"):
                shutil.rmtree(leftover)
            version = max(self.versions(model), default=0) + 1
            temporary = shelf / f".{version}.{secrets.token_hex(8)}.tmp"
            try:
                write_release(
                    temporary, build(version), name=f"{model}/{version}", identity=identity
                )
                temporary.rename(self.path(model, version))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_folder(shelf)
        return self.path(model, version)


def _privacy_line(folder: Path) -> str | None:
    try:
        with (folder / "privacy.json").open("rb") as file:
            line = json.loads(file.read(limit_of("privacy.json")))["statement"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return "".join(c for c in line if c.isprintable()) if isinstance(line, str) else None
