"""The roster of a consortium: which sites there are, and the public identity of each.

Every site has its own copy, received out of band, and so has the coordinator. Under secure
aggregation a site speaks with no other site than those, so that no coordinator can invent one.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from fedward.core.errors import ConfigError, SignatureInvalid
from fedward.core.files import write_atomic
from fedward.core.identity import PublicIdentity
from fedward.core.study import Name
from fedward.core.toml import Section, read_toml


class _Roster(Section):
    sites: dict[Name, str] = Field(min_length=1)


def load_roster(path: Path) -> dict[str, PublicIdentity]:
    """Read a roster: `[sites]`, with each site's name and its public key in PEM.

    Raises:
        ConfigError: The file cannot be read, or a key in it is none.
    """
    roster = {}
    for name, pem in read_toml(path, _Roster).sites.items():
        try:
            roster[name] = PublicIdentity.from_pem(pem.encode())
        except SignatureInvalid as error:
            raise ConfigError(f"is {error}", file=str(path), key=f"[sites] {name}") from error
    return roster


def write_roster(path: Path, roster: Mapping[str, PublicIdentity]) -> None:
    """Write a roster, sorted by name."""
    lines = [f"{name} = {json.dumps(roster[name].pem().decode())}\n" for name in sorted(roster)]
    write_atomic(path, "[sites]\n" + "".join(lines))
