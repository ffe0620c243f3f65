"""Who asks, and what they may."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["clinician", "operator", "auditor"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: Goes into the audit log: an API key's name, `oidc:` and a person's, or `cds:` and a
            record system's issuer. A key's name holds no colon.
        roles: What they may do, perhaps nothing.
    """

    name: str
    roles: frozenset[Role]


ANYONE = Caller("anonymous", frozenset())  # where no keys are set up
