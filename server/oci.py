"""A registry's copy in an OCI registry: hospitals that reach one need no shared folder.

A release is `REPOSITORY/MODEL:VERSION`; The Update Framework's metadata are `REPOSITORY:tuf`, one
artifact, so that nobody sees half of a state. Needs the extra `oci`.
"""

from pathlib import Path

from fedward.core.errors import ConfigError
from fedward.core.modelsigning import BUNDLE_NAME
from fedward.core.oci import OciAddress, pull_files, push_files
from fedward.core.release import limit_of
from fedward.server.registry import TUF, Registry


def push_registry(registry: Path, address: str) -> list[str]:
    """Copy what a registry holds and the OCI registry does not.

    The metadata go last: until they are there, hospitals see the state before, whole.

    Args:
        registry: The registry's folder.
        address: `oci://HOST/REPOSITORY`.

    Returns:
        The releases that were new there, as `MODEL/VERSION`.

    Raises:
        ConfigError: `oras` is not installed, the address is none, or another release has the
            place of one of ours.
        RegistryUnreachable: The registry does not answer, or refuses.
    """
    to, shelves = OciAddress.parse(address), Registry(registry)
    pushed = []
    for model in shelves.models():
        if model == TUF:
            continue
        for version in shelves.versions(model):
            files = _files(shelves.path(model, version))
            there = pull_files(to.below(model), str(version), limit_of=limit_of)
            if there is None:
                push_files(to.below(model), str(version), files)
                pushed.append(f"{model}/{version}")
            elif there.get(BUNDLE_NAME) != files[BUNDLE_NAME]:
                raise ConfigError(
                    f"has another {model}/{version}; a version is never used again: publish to "
                    "another repository",
                    file=address,
                )
    if shelves.founded:
        push_files(to, TUF, _files(registry / TUF))
    return pushed


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
