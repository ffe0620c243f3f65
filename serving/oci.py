"""A mirror of an OCI registry in the store, to be followed as any registry is.

What arrives is not trusted: `updates` holds the metadata against the pinned root, and the store
each release against them and the publisher's key. Needs the extra `oci`.
"""

import hashlib
import json
import re
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from fedward.core.errors import RegistryUnreachable
from fedward.core.files import write_atomic
from fedward.core.modelsigning import BUNDLE_NAME
from fedward.core.oci import OciAddress, pull_files
from fedward.core.release import limit_of, valid_name
from fedward.serving.store import Store

_TUF = "tuf"
_METADATA = re.compile(r"(\d{1,6}\.root|root|targets|snapshot|timestamp)\.json")
_LARGEST_METADATA = 1024 * 1024


def mirror_registry(address: str, folder: Path, store: Store) -> None:
    """Bring the metadata, and of each model the newest release that the store does not know.

    Args:
        address: `oci://HOST/REPOSITORY`.
        folder: The mirror.
        store: What is installed already is not fetched.

    Raises:
        ConfigError: `oras` is not installed, or the address is none.
        RegistryUnreachable: The registry does not answer, or what it sends is not what it says.
    """
    source = OciAddress.parse(address)
    metadata = pull_files(source, _TUF, limit_of=lambda _: _LARGEST_METADATA)
    if metadata is None:
        raise RegistryUnreachable(registry=address, reason="it has no metadata; push them there")
    for name, content in metadata.items():
        if _METADATA.fullmatch(name):
            write_atomic(folder / _TUF / name, content)
    for model, (version, digest) in _newest(metadata.get("targets.json", b"")).items():
        served = store.served().get(model)
        if served is not None and version <= served.highest:
            continue
        bundle = folder / model / str(version) / BUNDLE_NAME
        # Nothing of this is verified yet, but another release than the metadata's need not stay.
        if bundle.is_file() and hashlib.sha256(bundle.read_bytes()).hexdigest() == digest:
            continue
        files = pull_files(source.below(model), str(version), limit_of=limit_of)
        if files is None:
            raise RegistryUnreachable(registry=address, reason=f"it lacks {model}/{version}")
        _write(folder / model, str(version), files, address)


def _newest(targets: bytes) -> dict[str, tuple[int, str]]:
    """Newest version and its bundle's digest by model, as metadata say that nobody verified."""
    found: dict[str, tuple[int, str]] = {}
    try:
        named: dict[str, Any] = json.loads(targets)["signed"]["targets"]
        for name, target in named.items():
            model, version, file = name.split("/")
            if valid_name(model) and version.isascii() and version.isdecimal():
                entry = int(version[:9]), str(target["hashes"]["sha256"])
                if file == BUNDLE_NAME and entry > found.get(model, (0, "")):
                    found[model] = entry
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # the framework's own reading says what is wrong
    return found


def _write(shelf: Path, version: str, files: dict[str, bytes], address: str) -> None:
    for path in files:
        parts = PurePosixPath(path).parts
        if not 1 <= len(parts) <= 2 or ".." in parts or path.startswith("/") or "\0" in path:  # noqa: PLR2004 (variants/NAME)
            raise RegistryUnreachable(registry=address, reason="a path leaves the release")
    temporary = shelf / f".{version}.{secrets.token_hex(8)}.tmp"
    try:
        for path, content in files.items():
            write_atomic(temporary / path, content)
        # Of each model one release is kept: what the store took is in the store.
        for old in shelf.iterdir():
            if old != temporary:
                shutil.rmtree(old, ignore_errors=True)
        temporary.rename(shelf / version)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
