"""A release: the folder in which a model leaves a study and enters a hospital.

Its files are read in one order, and nothing is parsed before it is known to be the publisher's:
signature, then digests (no file more or less, no link, no path out of the folder, no file over
its limit), then content. The adapter adds the last check, the golden self-test, where a runtime
for the model is at hand. What was verified is kept in memory, so that what is used later is what
was verified, whoever writes to the folder meanwhile.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.arrays import check_safetensors, read_golden
from fedward.core.canonical import digest
from fedward.core.errors import ReleaseRejected, SignatureInvalid
from fedward.core.fields import ModelSignature, parse_signature
from fedward.core.files import sync_folder
from fedward.core.identity import Identity, PublicIdentity
from fedward.core.modelsigning import BUNDLE_NAME, root_digest, sign_digests, verify_bundle

REQUIRED = (
    "card.html",
    "card.json",
    "golden.npz",
    "model.onnx",
    "model.safetensors",
    "privacy.json",
    "signature.json",
    "training.json",
)
OPTIONAL = ("bom.cdx.json", "monitor.json")
_VARIANT = re.compile(r"variants/[a-z0-9][a-z0-9-]{0,30}\.onnx")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MIB = 2**20
LIMITS = {".onnx": 512 * _MIB, ".safetensors": 512 * _MIB}
_SMALL_LIMIT = 4 * _MIB
MAX_FIELDS = 4096


@dataclass(frozen=True, slots=True)
class Release:
    """A verified release.

    Attributes:
        signature: The model's interface, name and version.
        privacy: `privacy.json`; `statement` is its one line, `private` whether it promises.
        card: `card.json`.
        golden_inputs: float32 `(n, fields)`, drawn from the schema's ranges; NaN is missing.
        golden_outputs: float32 `(n, outputs)`, what the trained model gave for them.
        files: Every file's bytes by path, as verified.
        bundle: `model.sig` as verified.
        digest: One digest for all files, 64 hexadecimal digits.
    """

    signature: ModelSignature
    privacy: Mapping[str, Any]
    card: Mapping[str, Any]
    golden_inputs: NDArray[np.float32]
    golden_outputs: NDArray[np.float32]
    files: Mapping[str, bytes]
    bundle: bytes
    digest: str

    @property
    def label(self) -> str:
        """Name and version, as in `heart-disease/3`."""
        return f"{self.signature.model}/{self.signature.version}"


def write_release(
    folder: Path, files: Mapping[str, bytes], *, name: str, identity: Identity
) -> None:
    """Sign `files` and write them, durably, into the new folder `folder`.

    The caller renames the folder into place: until then no reader looks at it.

    Raises:
        ValueError: A file is missing, unknown or too large, or the identity cannot sign releases.
        FileExistsError: `folder` is there already.
    """
    problem = _wrong_names(files)
    if problem is not None:
        raise ValueError(f"a release {problem}")
    for path, content in files.items():
        if len(content) > limit_of(path):
            raise ValueError(f"{path} has {len(content)} bytes; the limit is {limit_of(path)}")
    digests = {path: digest(content) for path, content in files.items()}
    write_verified(folder, files, sign_digests(digests, name=name, identity=identity))


def write_verified(folder: Path, files: Mapping[str, bytes], bundle: bytes) -> None:
    """Write files and their bundle, durably, into the new folder `folder`.

    A folder under a name that no reader looks at needs no atomic files, only whole ones on disk.
    """
    folder.mkdir(parents=True)
    folders = {folder}
    for path, content in {**files, BUNDLE_NAME: bundle}.items():
        target = folder / path
        if target.parent not in folders:
            target.parent.mkdir()
            folders.add(target.parent)
        with target.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for written in (*folders, folder.parent):
        sync_folder(written)


def read_release(folder: Path, trusted: PublicIdentity) -> Release:
    """Verify a release and read it.

    Raises:
        SignatureInvalid: The signature, or a file's digest, does not verify with `trusted`.
        ReleaseRejected: The folder holds something else than the publisher signed, or what was
            signed is not a release that this version reads.
    """
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ReleaseRejected(
            release=str(folder), reason=f"is not a folder that can be read ({error.strerror})"
        ) from error
    try:
        bundle = _read(root, BUNDLE_NAME, release=str(folder))
        digests = verify_bundle(bundle, trusted)
        problem = _wrong_names(digests)
        if problem is not None:
            raise ReleaseRejected(release=str(folder), reason=problem)
        _refuse_unsigned(root, digests, release=str(folder))
        files: dict[str, bytes] = {}
        for path, expected in digests.items():
            files[path] = _read(root, path, release=str(folder))
            if digest(files[path]) != expected:
                raise SignatureInvalid(
                    f"{folder / path} is not what the publisher signed: its SHA-256 differs; "
                    "fetch the release again"
                )
    finally:
        os.close(root)
    return _parse(files, bundle, digests, release=str(folder))


def limit_of(path: str) -> int:
    """The most bytes that a release's file may have."""
    return LIMITS.get(Path(path).suffix, _SMALL_LIMIT)


def valid_name(name: str) -> bool:
    """Whether `name` can name a model: it becomes a folder and a part of a URL."""
    return _NAME.fullmatch(name) is not None


def _wrong_names(paths: Mapping[str, object]) -> str | None:
    for path in paths:
        if path not in REQUIRED and path not in OPTIONAL and not _VARIANT.fullmatch(path):
            # Also every path that is absolute or climbs out, and every pickle.
            return f"may not hold {path!r}; allowed: {', '.join(REQUIRED + OPTIONAL)}, variants/"
    missing = [path for path in REQUIRED if path not in paths]
    return f"lacks {', '.join(missing)}" if missing else None


def _refuse_unsigned(root: int, digests: Mapping[str, str], *, release: str) -> None:
    found = _walk(root, "", release=release)
    for path in found:
        if path != BUNDLE_NAME and path not in digests:
            raise ReleaseRejected(
                release=release, reason=f"holds {path!r}, which the publisher did not sign"
            )
    for path in digests:
        if path not in found:
            raise ReleaseRejected(release=release, reason=f"lacks {path}; fetch it again")


def _walk(folder: int, prefix: str, *, release: str) -> set[str]:
    paths: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_symlink():
                raise ReleaseRejected(release=release, reason=f"{path!r} is a link; none is read")
            if entry.is_dir(follow_symlinks=False):
                if path != "variants":
                    raise ReleaseRejected(
                        release=release,
                        reason=f"holds the folder {path!r}, which the publisher did not sign",
                    )
                inner = os.open(
                    entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder
                )
                try:
                    paths |= _walk(inner, "variants/", release=release)
                finally:
                    os.close(inner)
            else:
                paths.add(path)
    return paths


def _read(root: int, path: str, *, release: str) -> bytes:
    """A regular file's bytes, through no link and no more than its limit."""
    *folders, name = path.split("/")
    opened = [root]
    try:
        for folder in folders:
            opened.append(
                os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1])
            )
        # O_NONBLOCK: a pipe with a file's name must not hold us up.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1])
    except FileNotFoundError:
        raise ReleaseRejected(release=release, reason=f"lacks {path}; fetch it again") from None
    except OSError as error:
        raise ReleaseRejected(
            release=release, reason=f"{path!r} is a link or cannot be read ({error.strerror})"
        ) from error
    finally:
        for folder_descriptor in opened[1:]:
            os.close(folder_descriptor)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ReleaseRejected(release=release, reason=f"{path!r} is not a regular file")
        limit = limit_of(path)
        if status.st_size > limit:
            raise ReleaseRejected(
                release=release,
                reason=f"{path} has {status.st_size} bytes and the limit is {limit}",
            )
        content = file.read(limit + 1)  # it may have grown since fstat
    if len(content) > limit:
        raise ReleaseRejected(release=release, reason=f"{path} has more than {limit} bytes")
    return content


def _parse(
    files: dict[str, bytes], bundle: bytes, digests: Mapping[str, str], *, release: str
) -> Release:
    try:
        signature = parse_signature(_json(files, "signature.json"))
        inputs, outputs = read_golden(files["golden.npz"])
        check_safetensors(files["model.safetensors"])
        privacy, card = _json(files, "privacy.json"), _json(files, "card.json")
    except ValueError as error:
        raise ReleaseRejected(release=release, reason=str(error)) from error
    problem = None
    if not valid_name(signature.model):
        problem = "signature.json: the model's name is not allowed"
    elif len(signature.fields) > MAX_FIELDS:
        problem = f"signature.json: more than {MAX_FIELDS} fields"
    elif not isinstance(privacy.get("statement"), str):
        problem = "privacy.json lacks `statement`"
    elif not isinstance(privacy.get("private"), bool):
        problem = "privacy.json lacks `private`"
    elif inputs.shape[1] != len(signature.fields) or outputs.shape != (
        len(inputs),
        len(signature.outputs),
    ):
        problem = "golden.npz does not fit signature.json"
    if problem is not None:
        raise ReleaseRejected(release=release, reason=problem)
    return Release(
        signature=signature,
        privacy=privacy,
        card=card,
        golden_inputs=inputs,
        golden_outputs=outputs,
        files=files,
        bundle=bundle,
        digest=root_digest(digests),
    )


def _json(files: Mapping[str, bytes], path: str) -> dict[str, Any]:
    try:
        value = json.loads(files[path])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not an object")  # noqa: TRY004 (a file's content, not a type)
    return value
