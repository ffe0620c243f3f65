"""The Update Framework over a registry: roll-back, freeze and mix-and-match protection.

theupdateframework.github.io/specification/v1.0.33. A target is a release's signed bundle, which
vouches for every file of it. Root keys, several of which must sign, stay offline; the publisher's
key signs the rest. Needs the extra `tuf`.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import StorageError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from fedward.core.errors import ConfigError
from fedward.core.files import alone_in, write_atomic
from fedward.core.identity import Identity
from fedward.core.modelsigning import BUNDLE_NAME
from fedward.server.registry import FIRST_ROOT, TUF, Registry

_DAY = datetime.timedelta(days=1)
_ROOT_DAYS, _TARGETS_DAYS, _TIMESTAMP_DAYS = 365, 90, 14


def found_registry(
    registry: Path, *, roots: Sequence[Identity], threshold: int, publisher: Identity
) -> Path:
    """Write a registry's first root of trust.

    Args:
        registry: The registry's folder.
        roots: The root identities; kept offline afterwards.
        threshold: How many of them must sign a root.
        publisher: Signs targets, snapshots and timestamps.

    Returns:
        The root's file, which every hospital pins.

    Raises:
        ValueError: The threshold cannot be met, or there is a root already.
    """
    if not 1 <= threshold <= len(roots):
        raise ValueError(f"threshold is {threshold} and there are {len(roots)} root identities")
    path = registry / TUF / FIRST_ROOT
    if path.exists():
        raise ValueError(f"{path} is there already; a new root must be signed by the old one")
    root = Root(expires=_in(_ROOT_DAYS), consistent_snapshot=False)
    for identity in roots:
        root.add_key(_public(identity), Root.type)
    root.roles[Root.type].threshold = threshold
    for role in (Targets.type, Snapshot.type, Timestamp.type):
        root.add_key(_public(publisher), role)
    signed = Metadata(root)
    for identity in roots[:threshold]:
        signed.sign(CryptoSigner(identity.key), append=True)
    write_atomic(path, signed.to_bytes())
    refresh_registry(registry, publisher=publisher)
    return path


def refresh_registry(
    registry: Path, *, publisher: Identity, valid_days: float = _TIMESTAMP_DAYS
) -> None:
    """Sign what the registry holds now; after every publication, and before the time is up.

    Args:
        registry: The registry's folder, with a root.
        publisher: As when it was founded.
        valid_days: How long a hospital may take it for current.

    Raises:
        ConfigError: The root names another publisher, or there is none: no hospital would take it.
    """
    folder = registry / TUF
    _check_publisher(folder, publisher)
    with alone_in(folder):  # two that publish at once must not both sign the same version
        _sign_state(folder, Registry(registry), publisher, valid_days=valid_days)


def _sign_state(folder: Path, shelves: Registry, publisher: Identity, *, valid_days: float) -> None:
    targets = Targets(version=_next(folder / "targets.json"), expires=_in(_TARGETS_DAYS))
    for model in shelves.models():
        for version in shelves.versions(model):
            bundle = shelves.path(model, version) / BUNDLE_NAME
            name = f"{model}/{version}/{BUNDLE_NAME}"
            targets.targets[name] = TargetFile.from_file(name, str(bundle), ["sha256"])
    signer = CryptoSigner(publisher.key)
    snapshot = Snapshot(version=_next(folder / "snapshot.json"), expires=_in(_TARGETS_DAYS))
    snapshot.meta["targets.json"] = MetaFile(version=targets.version)
    timestamp = Timestamp(version=_next(folder / "timestamp.json"), expires=_in(valid_days))
    timestamp.snapshot_meta = MetaFile(version=snapshot.version)
    # The timestamp last: until it is there, a reader sees the state before, whole.
    for name, signed in (
        ("targets.json", Metadata(targets)),
        ("snapshot.json", Metadata(snapshot)),
        ("timestamp.json", Metadata(timestamp)),
    ):
        signed.sign(signer)
        write_atomic(folder / name, signed.to_bytes())


def _check_publisher(folder: Path, publisher: Identity) -> None:
    names = [path.name.split(".")[0] for path in folder.glob("*.root.json")]
    roots = [int(name) for name in names if name.isdecimal()]
    newest = folder / f"{max(roots, default=1)}.root.json"
    try:
        root = Metadata[Root].from_file(str(newest)).signed
    except (StorageError, DeserializationError) as error:
        raise ConfigError("is not a root of trust; found the registry", file=str(newest)) from error
    if any(
        _public(publisher).keyid not in root.roles[role].keyids
        for role in (Targets.type, Snapshot.type, Timestamp.type)
    ):
        raise ConfigError(
            "names another publisher than this one; sign with its key, or found a new registry",
            file=str(newest),
        )


def _public(identity: Identity) -> SSlibKey:
    return SSlibKey.from_crypto(identity.public.key)


def _in(days: float) -> datetime.datetime:
    return datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0) + days * _DAY


def _next(path: Path) -> int:
    try:
        return int(Metadata.from_file(str(path)).signed.version) + 1
    except StorageError:
        return 1
