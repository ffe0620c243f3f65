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

from fedward.core.errors import FedwardError, RegistryUnreachable, ReleaseRejected
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
        mirrored: Address of the OCI registry that the folder mirrors; None if it is no mirror.
    """

    store: Store
    registry: Path
    root: bytes
    mirrored: str | None = None

    def look(self) -> str | None:
        """Install what is newer than what was installed.

        Returns:
            Why the registry's word is stale, or None if it is current.

        Raises:
            ReleaseRejected: The registry's metadata do not verify, are older than what was seen,
                or do not fit the release that they name. What serves goes on serving.
            SignatureInvalid: A release does not verify.
        """
        if self.mirrored is not None:
            from fedward.serving.oci import mirror_registry

            try:
                mirror_registry(self.mirrored, self.registry, self.store)
            except RegistryUnreachable as error:
                return str(error)
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
        self._install(Metadata[Targets].from_file(str(state / "targets.json")).signed)
        return None

    def _install(self, targets: Targets) -> None:
        """Install what verified metadata name and the store does not know."""
        for model, version in sorted(_newest(targets).items()):
            if self._known(model, version):
                continue
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

    def _known(self, model: str, version: int) -> bool:
        """Whether a version was installed before, or was sent back for good."""
        served, tried = self.store.served().get(model), self.store.candidates().get(model)
        failed = tried is not None and tried.stage == "failed" and version <= tried.version
        return failed or (served is not None and version <= served.highest)


def follow(store: Store, registry: Path | str, root: bytes) -> Updates:
    """Follow a registry's folder, or an OCI registry by its address `oci://HOST/REPOSITORY`."""
    if isinstance(registry, Path):
        return Updates(store, registry, root)
    return Updates(store, store.folder / "state" / "oci", root, mirrored=registry)


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
