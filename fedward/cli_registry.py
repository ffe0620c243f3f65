"""`fedward registry`: what was published, and its root of trust."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedward.output import Json, emit

registry_app = typer.Typer(help="Published releases.", no_args_is_help=True)

RegistryFolder = Annotated[Path, typer.Argument(help="The registry's folder.", show_default=False)]
PublisherKey = Annotated[Path, typer.Option(help="The publisher's private key (PEM).")]


@registry_app.command("list")
def registry_list(registry: RegistryFolder, json_output: Json = False) -> None:
    """List what was published: version, date and what is promised; `verify` checks one."""
    from dataclasses import asdict

    from fedward.console import print_registry
    from fedward.server.registry import Registry

    shelves = Registry(registry)
    value = {
        "registry": str(registry),
        "founded": shelves.founded,
        "releases": [asdict(release) for release in shelves.listing()],
    }
    if json_output:
        emit(value)
    else:
        print_registry(value)


@registry_app.command("found")
def registry_found(
    registry: RegistryFolder,
    publisher: PublisherKey,
    root: Annotated[
        list[Path],
        typer.Option(help="A root identity's private key, several times; made if it is missing."),
    ],
    threshold: Annotated[
        int | None, typer.Option(help="How many must sign a root; by default more than half.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Give a registry a root of trust, which hospitals pin; keep the root keys offline."""
    from fedward.core.identity import Identity

    updates = _updates()
    signer = Identity.load(publisher)
    for file in root:
        if not file.exists():
            Identity.generate_publisher().save(file)
    roots = [Identity.load(file) for file in root]
    needed = len(roots) // 2 + 1 if threshold is None else threshold
    try:
        path = updates.found_registry(registry, roots=roots, threshold=needed, publisher=signer)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if json_output:
        emit({"root": str(path), "threshold": needed, "roots": len(roots)})
    else:
        sys.stdout.write(f"{path}: pin it at every hospital; {needed} of {len(roots)} keys\n")


@registry_app.command("refresh")
def registry_refresh(
    registry: RegistryFolder, publisher: PublisherKey, json_output: Json = False
) -> None:
    """Sign what the registry holds again; without it, hospitals call it stale after two weeks."""
    from fedward.core.identity import Identity

    _updates().refresh_registry(registry, publisher=Identity.load(publisher))
    if json_output:
        emit({"registry": str(registry), "refreshed": True})
    else:
        sys.stdout.write(f"{registry} is signed anew\n")


@registry_app.command("push")
def registry_push(
    registry: RegistryFolder,
    address: Annotated[str, typer.Argument(help="oci://HOST/REPOSITORY", show_default=False)],
    json_output: Json = False,
) -> None:
    """Copy what is new to an OCI registry, which hospitals follow with serve --registry."""
    from fedward.server.oci import push_registry

    pushed = push_registry(registry, address)
    if json_output:
        emit({"registry": str(registry), "to": address, "releases": pushed})
    else:
        sys.stdout.write(f"{address}: {', '.join(pushed) or 'no new release'}; metadata renewed\n")


@registry_app.command("verify")
def registry_verify(
    release: Annotated[Path, typer.Argument(help="The release's folder.", show_default=False)],
    publisher: Annotated[Path, typer.Option(help="The publisher's public key (PEM).")],
    json_output: Json = False,
) -> None:
    """Verify a release's signature and digests."""
    from fedward.core.errors import ConfigError
    from fedward.core.identity import PublicIdentity
    from fedward.core.release import read_release

    try:
        pem = publisher.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(publisher)) from error
    verified = read_release(release, PublicIdentity.from_pem(pem))
    if json_output:
        emit({"release": str(release), "verified": True, "model": verified.label})
    else:
        sys.stdout.write(f"{release} verifies\n")


def _updates() -> Any:
    try:
        from fedward.server import updates
    except ImportError as error:
        from fedward.core.errors import ConfigError

        raise ConfigError(
            f"lacks {error.name}; pip install 'fedward[tuf]'", file="this installation"
        ) from error
    return updates
