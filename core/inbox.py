"""The inbox of a store: where a site puts a release that came over the wire.

The site checks the signature and every digest; the adapter, which has a runtime for the model,
takes it from here and does the rest. The two share a folder and no code above this layer.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from fedward.core.errors import ReleaseRejected
from fedward.core.files import sync_folder, write_atomic
from fedward.core.identity import PublicIdentity
from fedward.core.release import Release, read_release

INBOX, PIN = "inbox", "trusted.pem"
_MOST_FILES = 64


def receive_release(
    files: Mapping[str, bytes],
    *,
    store: Path,
    trusted: PublicIdentity,
    judge: Callable[[Release], None] = lambda _: None,
) -> Release:
    """Verify a release's files and put them into the store's inbox.

    Args:
        files: Every file of the release, its bundle included, by path inside it.
        store: The site's store.
        trusted: The publisher that the site file pins; pinned in the store, too.
        judge: The site's own word on the verified release; what it raises is raised, and nothing
            is left of the release.

    Raises:
        SignatureInvalid, ReleaseRejected: It is not the publisher's; nothing is left of it.
    """
    if len(files) > _MOST_FILES:
        raise ReleaseRejected(release="received", reason=f"has {len(files)} files")
    for path in files:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise ReleaseRejected(release="received", reason="a path leaves the folder")
    inbox = store / INBOX
    folder = inbox / f".{secrets.token_hex(8)}.tmp"
    try:
        for path, content in files.items():
            write_atomic(folder / path, content)
        release = read_release(folder, trusted)
        judge(release)
        target = inbox / f"{release.signature.model}-{release.signature.version:06d}"
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(inbox)
    if not (store / PIN).exists():
        write_atomic(store / PIN, trusted.pem())
    return release


def waiting(store: Path) -> list[Path]:
    """The releases in the inbox, in the order of model and version."""
    inbox = store / INBOX
    if not inbox.is_dir():
        return []
    return sorted(path for path in inbox.iterdir() if not path.name.startswith("."))
