"""Follow a registry through The Update Framework: newer releases in, nothing older, never dark.

Needs the extra `tuf`. The root is pinned; whoever offers the registry can neither go back to an
older state, nor hold the hospital at one without that showing, nor mix releases of two states.
What runs out only makes the adapter stale: it says so everywhere and goes on serving.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import FetcherInterface, Updater

from fedward.core.errors import FedwardError, ReleaseRejected
from fedward.core.modelsigning import BUNDLE_NAME
from fedward.core.release import valid_name
from fedward.serving.store import Store

_TUF = "tuf"
_NOT_FOUND = 404
_PARTS = 3


class _FolderFetcher(FetcherInterface):
    """Reads metadata from a folder, as if it were downloaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._folder / url.rsplit("/", 1)[-1]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DownloadHTTPError(f"{path} is not there", _NOT_FOUND) from None
        except OSError as error:
            raise DownloadError(f"{path} cannot be read: {error.strerror}") from error
        yield content


@dataclass(frozen=True, slots=True)
class Updates:
    """A registry that a store follows.

    Attributes:
        store: The hospital's store; its `trusted.pem` must be pinned.
        registry: The registry's folder.
        root: The pinned root's bytes.
    """

    store: Store
    registry: Path
    root: bytes

    def look(self) -> str | None:
        """Install what is newer than what was installed.

        Returns:
            Why the registry's word is stale, or None if it is current.

        Raises:
            ReleaseRejected: The registry's metadata do not verify, are older than what was seen,
                or do not fit the release that they name. What serves goes on serving.
            SignatureInvalid: A release does not verify.
        """
        state = self.store.folder / "state" / _TUF
        state.mkdir(parents=True, exist_ok=True)
        updater = Updater(
            metadata_dir=str(state),
            metadata_base_url="folder:/",
            fetcher=_FolderFetcher(self.registry / _TUF),
            bootstrap=self.root,
        )
        try:
            updater.refresh()
        except ExpiredMetadataError as error:
            return f"the registry's word has run out ({error}); ask the publisher to renew it"
        except DownloadError as error:
            return f"the registry cannot be reached ({error})"
        except (RepositoryError, ValueError) as error:
            raise ReleaseRejected(
                release=str(self.registry), reason=f"its metadata do not verify: {error}"
            ) from error
        targets = Metadata[Targets].from_file(str(state / "targets.json")).signed
        for model, version in sorted(_newest(targets).items()):
            served = self.store.served().get(model)
            if served is not None and version <= served.highest:
                continue
            tried = self.store.candidates().get(model)
            if tried is not None and tried.stage == "failed" and version <= tried.version:
                continue  # it was sent back for good, and the reason is kept
            folder = self.registry / model / str(version)
            target = targets.targets[f"{model}/{version}/{BUNDLE_NAME}"]
            try:
                target.verify_length_and_hashes((folder / BUNDLE_NAME).read_bytes())
            except (OSError, LengthOrHashMismatchError) as error:
                raise ReleaseRejected(
                    release=str(folder), reason=f"it is not what the registry vouches for: {error}"
                ) from error
            release = self.store.install(folder, self.store.trusted())
            if release.label != f"{model}/{version}":
                raise ReleaseRejected(release=str(folder), reason=f"it holds {release.label}")
        return None


def _newest(targets: Targets) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in targets.targets:
        parts = name.split("/")
        if len(parts) == _PARTS and parts[2] == BUNDLE_NAME and parts[1].isdecimal():
            model, version = parts[0], int(parts[1])
            if valid_name(model):
                found[model] = max(version, found.get(model, 0))
    return found


def problem_of(updates: Updates) -> str | None:
    """As `Updates.look`, with every refusal as a text."""
    try:
        return updates.look()
    except FedwardError as error:
        return str(error)
