"""Waiting for a person: where a hospital's policy asks for it, no release serves unapproved.

`STORE/policy.json` is the hospital's own: `{"approval": true}`, and `rollout` as `staging` has it.
What waits is verified and kept
already, so that approval takes effect at once.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fedward.core.errors import ReleaseRejected
from fedward.core.files import write_atomic
from fedward.serving.staging import Limits, policy_limits

_POLICY, _WAITING, _DECISIONS = "policy.json", "waiting.json", "approvals.jsonl"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A release that was verified and is not served.

    Attributes:
        version: Which.
        digest: Of all its files, 64 hexadecimal digits.
        declined: Whether a person said no.
    """

    version: int
    digest: str
    declined: bool = False


def needs_approval(store: Path) -> bool:
    """Whether the hospital's policy asks for a named approver.

    Raises:
        ReleaseRejected: The policy cannot be read: then nothing new is served.
    """
    return _policy(store)[0]


def rollout_limits(store: Path) -> Limits | None:
    """By which stages the hospital's policy brings a release into service. Raises likewise."""
    return _policy(store)[1]


def _policy(store: Path) -> tuple[bool, Limits | None]:
    try:
        policy = json.loads((store / _POLICY).read_bytes())
    except FileNotFoundError:
        return False, None
    except (ValueError, OSError):
        policy = None
    if not isinstance(policy, dict) or not isinstance(policy.get("approval"), bool):
        raise ReleaseRejected(
            release=str(store / _POLICY), reason='must be {"approval": true} or {"approval": false}'
        )
    try:
        return policy["approval"], policy_limits(policy)
    except (ValueError, TypeError) as error:
        raise ReleaseRejected(release=str(store / _POLICY), reason=str(error)) from error


def waiting(store: Path) -> dict[str, Waiting]:
    """What waits or was declined, by model. Raises `ReleaseRejected` if the file is malformed."""
    try:
        entries = json.loads((store / _WAITING).read_bytes())
        return {name: Waiting(**entry) for name, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ReleaseRejected(
            release=str(store / _WAITING), reason="malformed; install again"
        ) from error


def write_waiting(store: Path, entries: dict[str, Waiting]) -> None:
    """Replace what waits, in one step."""
    value = {name: asdict(entry) for name, entry in sorted(entries.items())}
    write_atomic(store / _WAITING, json.dumps(value, indent=2))


def record_decision(store: Path, *, model: str, entry: Waiting, by: str, approved: bool) -> None:
    """Keep who decided what, and when."""
    decision = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "by": by,
        "approved": approved,
        "model": model,
        "version": entry.version,
        "digest": entry.digest,
    }
    with (store / _DECISIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(decision) + "\n")
