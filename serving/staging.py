"""A new release serves in stages: shadow, canary, all. What the store keeps of it.

`STORE/rollout.json` holds the candidate of each model; `serving.json` names it only when it serves
alone. A crash at any point leaves the candidate in the stage before or after, and somebody serving.

The hospital says how in `STORE/policy.json`, or to `fedward serve`; without either, a release
serves at once::

    {"approval": false, "rollout": {"shadow": 500, "canary": 1000, "share": 0.1}}
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from fedward.core.errors import ReleaseRejected
from fedward.core.files import write_atomic

Stage = Literal["shadow", "canary", "failed"]
_ROLLOUT = "rollout.json"
# At this many rows a candidate that is plainly wrong need not wait for the end of its stage.
EARLY_ROWS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a candidate is watched, and what sends it back.

    Attributes:
        shadow: Rows that it answers beside the serving version, for nobody; 0 skips the stage.
        canary: Rows that it answers for callers before it serves alone; 0 skips the stage.
        share: Part of the requests that it answers as a canary.
        tolerance: Difference of a probability from the serving version's that counts as
            disagreement.
        max_disagreement: Largest share of rows that may disagree.
        max_slowdown: Most that its median time may be, over the serving version's.
        max_errors: Requests on which it may fail where the serving version answers.
    """

    shadow: int = 0
    canary: int = 0
    share: float = 0.1
    tolerance: float = 0.1
    max_disagreement: float = 0.1
    max_slowdown: float = 3.0
    max_errors: int = 0

    def __post_init__(self) -> None:
        """Check. Raises `ValueError`."""
        for name in ("shadow", "canary", "max_errors"):
            value: Any = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is a whole number from 0")
        for name in ("share", "tolerance", "max_disagreement", "max_slowdown"):
            low, high = (1, math.inf) if name == "max_slowdown" else (0, 1)
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError(f"{name} is a number from {low} to {high}")
        if self.canary and not self.share > 0:
            raise ValueError("a canary needs a share of the requests")

    @property
    def first(self) -> Stage | None:
        """The stage that a release begins in; None if it serves at once."""
        return "shadow" if self.shadow else "canary" if self.canary else None

    def after(self, stage: Stage) -> Stage | None:
        """The stage that follows; None if the release then serves alone."""
        return "canary" if stage == "shadow" and self.canary else None

    def rows(self, stage: Stage) -> int:
        """Rows that a stage takes."""
        return self.shadow if stage == "shadow" else self.canary


@dataclass(frozen=True, slots=True)
class Candidate:
    """A release on its way into service.

    Attributes:
        version: Which.
        digest: Of all its files, 64 hexadecimal digits.
        stage: Where it is; `failed` if it was sent back.
        limits: By which it is judged, as they were when it began.
        reason: Why it was sent back.
    """

    version: int
    digest: str
    stage: Stage
    limits: Limits
    reason: str = ""

    def at(self, stage: Stage, *, reason: str = "") -> "Candidate":
        """The same in another stage."""
        return replace(self, stage=stage, reason=reason)


def policy_limits(policy: Mapping[str, Any]) -> Limits | None:
    """The `rollout` of a hospital's policy; None if it has none. Raises `ValueError`."""
    value = policy.get("rollout")
    if value is None:
        return None
    known = [field.name for field in fields(Limits)]
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"rollout takes {', '.join(known)}")
    return Limits(**value)


def candidates(store: Path) -> dict[str, Candidate]:
    """The candidates by model. Raises `ReleaseRejected` if the file is malformed."""
    try:
        entries = json.loads((store / _ROLLOUT).read_bytes())
        return {
            name: Candidate(**{**entry, "limits": Limits(**entry["limits"])})
            for name, entry in entries.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReleaseRejected(
            release=str(store / _ROLLOUT), reason="malformed; remove it, and install again"
        ) from error


def write_candidates(store: Path, entries: Mapping[str, Candidate]) -> None:
    """Replace the candidates, in one step."""
    value = {name: asdict(entry) for name, entry in sorted(entries.items())}
    write_atomic(store / _ROLLOUT, json.dumps(value, indent=2))
