"""An OCI registry as a place for files: what a container registry holds beside images.

Through `oras` (extra `oci`), which brings the credentials that docker or podman keep. Nothing that
comes from a registry is trusted: sizes are limited before and while they are read, digests are
checked, and names are checked by whoever writes them. Signatures are somebody else's affair.
"""

import hashlib
import ipaddress
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from fedward.core.errors import ConfigError, RegistryUnreachable

SCHEME = "oci://"
_ADDRESS = re.compile(r"oci://([a-zA-Z0-9.\-]+|\[[0-9a-f:]+\])(:\d{1,5})?((?:/[a-z0-9._\-]+)+)")
_TITLE = "org.opencontainers.image.title"
_LAYER = "application/octet-stream"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LARGEST_MANIFEST = 1024 * 1024
_MOST_FILES = 64
_CHUNK = 1 << 20
_NOT_FOUND, _OK = 404, 200
_SECONDS = (5, 30)  # to connect, and that a registry may be silent


@dataclass(frozen=True, slots=True)
class OciAddress:
    """A repository in an OCI registry.

    Attributes:
        host: With the port, if there is one.
        repository: Its name there.
    """

    host: str
    repository: str

    @classmethod
    def parse(cls, text: str) -> "OciAddress":
        """Read `oci://HOST[:PORT]/REPOSITORY`. Raises `ConfigError`."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise ConfigError(
                "is no OCI repository; write oci://registry.example/hospitals/releases",
                file=text,
            )
        return cls(found[1] + (found[2] or ""), found[3][1:])

    def below(self, name: str) -> "OciAddress":
        """The repository `name` under this one."""
        return OciAddress(self.host, f"{self.repository}/{name}")

    @property
    def loopback(self) -> bool:
        """Whether it is this machine, which alone may be asked without TLS."""
        name = self.host.rpartition(":")[0] or self.host
        if name == "localhost":
            return True
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return False


def push_files(address: OciAddress, tag: str, files: Mapping[str, bytes]) -> None:
    """Put files under a tag, in one step: a reader sees the old ones or the new ones.

    Args:
        address: The repository.
        tag: The tag.
        files: Content by path.

    Raises:
        ConfigError: `oras` is not installed.
        RegistryUnreachable: The registry does not answer, or refuses.
    """
    with _client(address) as (client, container_of):
        container = container_of(tag)
        layers = [
            _descriptor(content, _LAYER, annotations={_TITLE: path})
            for path, content in sorted(files.items())
        ]
        config = _descriptor(b"{}", "application/vnd.oci.empty.v1+json")
        with tempfile.TemporaryDirectory(prefix="fedward-oci-") as folder:
            for part, content in ((config, b"{}"), *zip(layers, _sorted(files), strict=True)):
                file = Path(folder) / "blob"
                file.write_bytes(content)
                _check(client.upload_blob(str(file), container, part), address)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": "application/vnd.fedward.release",
            "config": config,
            "layers": layers,
        }
        _check(client.upload_manifest(manifest, container), address)


def pull_files(
    address: OciAddress, tag: str, *, limit_of: Callable[[str], int]
) -> dict[str, bytes] | None:
    """The files under a tag; None if there is no such tag.

    Args:
        address: The repository.
        tag: The tag.
        limit_of: Of a path, the most bytes that it may have.

    Raises:
        ConfigError: `oras` is not installed.
        RegistryUnreachable: The registry does not answer, or what it answers is not what it says.
    """
    with _client(address) as (client, container_of):
        container = container_of(tag)
        found = client.do_request(
            f"{client.prefix}://{container.manifest_url()}",
            headers={"Accept": _MANIFEST},
            stream=True,
        )
        if found.status_code == _NOT_FOUND:
            return None
        _check(found, address)
        layers = _layers(_read(found, _LARGEST_MANIFEST, address), address)
        files = {}
        for path, (digest, size) in layers.items():
            limit = limit_of(path)
            if size > limit:
                raise _lies(address, f"{path[:64]!r} has {size} bytes and the limit is {limit}")
            blob = client.get_blob(container, digest, stream=True)
            _check(blob, address)
            content = _read(blob, size, address)
            if "sha256:" + hashlib.sha256(content).hexdigest() != digest:
                raise _lies(address, f"{path[:64]!r} does not have its digest")
            files[path] = content
        return files


def _sorted(files: Mapping[str, bytes]) -> list[bytes]:
    return [content for _, content in sorted(files.items())]


def _descriptor(content: bytes, kind: str, **more: Any) -> dict[str, Any]:
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    return {"mediaType": kind, "size": len(content), "digest": digest, **more}


def _layers(content: bytes, address: OciAddress) -> dict[str, tuple[str, int]]:
    try:
        layers = json.loads(content)["layers"]
        found = {}
        for layer in layers:
            path, digest, size = layer["annotations"][_TITLE], layer["digest"], layer["size"]
            if not isinstance(path, str) or type(size) is not int or size < 0 or path in found:
                raise ValueError(path)  # noqa: TRY301 (all that is malformed ends alike)
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                raise ValueError(path)  # noqa: TRY301 (as above)
            found[path] = (digest, size)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _lies(address, "its manifest is malformed") from error
    if len(found) > _MOST_FILES:
        raise _lies(address, f"it names {len(found)} files")
    return found


def _read(response: Any, limit: int, address: OciAddress) -> bytes:
    """A response's body; it may claim another length than it has."""
    parts, left = [], limit
    for part in response.iter_content(_CHUNK):
        left -= len(part)
        if left < 0:
            raise _lies(address, f"it sends more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _check(response: Any, address: OciAddress) -> None:
    if not _OK <= response.status_code < 300:  # noqa: PLR2004 (HTTP: it was done)
        raise _lies(address, f"it answers {response.status_code}")


def _lies(address: OciAddress, reason: str) -> RegistryUnreachable:
    return RegistryUnreachable(registry=f"{SCHEME}{address.host}", reason=reason)


@contextmanager
def _client(address: OciAddress) -> Iterator[tuple[Any, Callable[[str], Any]]]:
    try:
        import requests
        from oras.client import OrasClient
    except ImportError as error:
        raise ConfigError(
            f"needs {error.name}; pip install 'fedward[oci]'",
            file=f"{SCHEME}{address.host}/{address.repository}",
        ) from error

    client = OrasClient(hostname=address.host, insecure=address.loopback)
    # Without oras' decorator, which tries six times over two minutes: whoever asks looks again
    # soon, and has other things to look after meanwhile.
    client.do_request = MethodType(OrasClient.do_request.__wrapped__, client)
    session = client.session
    ask = session.request
    session.request = lambda *args, **options: ask(*args, **{"timeout": _SECONDS, **options})

    def container_of(tag: str) -> Any:
        container = client.get_container(f"{address.host}/{address.repository}:{tag}")
        client.auth.load_configs(container)
        return container

    try:
        yield client, container_of
    except requests.RequestException as error:
        raise _lies(address, f"it cannot be reached ({type(error).__name__})") from error
    except ValueError as error:
        # What oras raises for an answer that it does not like.
        raise _lies(address, str(error)[:200]) from error
    finally:
        session.close()
