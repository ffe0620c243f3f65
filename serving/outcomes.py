"""What became of the patients: calibration, and rates by subgroup.

An answer of `/predict` carries a receipt: the version, the probability and a nonce under the
adapter's own key. Whoever later knows the outcome sends it back with the receipt, so that the
adapter keeps no table of patients: nothing in a receipt or in the outcomes' file says who it was.
"""

import base64
import binascii
import hmac
import json
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.files import write_atomic
from fedward.serving.problems import Problem

_PACKED = struct.Struct("<If12s")  # version, probability, nonce
_TAG_BYTES = 16
_KEY_BYTES = 32
_BINS = 10
_MOST_GROUPS = 8
_LONGEST = 64


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an answer said."""

    version: int
    probability: float
    nonce: str


class Receipts:
    """Makes and reads receipts.

    Args:
        file: The key; made if missing, readable by its owner only.
    """

    def __init__(self, file: Path) -> None:
        if not file.exists():
            write_atomic(file, secrets.token_bytes(_KEY_BYTES), mode=0o600)
        self._key = file.read_bytes()

    def make(self, model: str, version: int, probability: float) -> str:
        """A receipt for one answer, 64 characters."""
        packed = _PACKED.pack(version, probability, os.urandom(12))
        return base64.urlsafe_b64encode(packed + self._tag(model, packed)).decode().rstrip("=")

    def read(self, model: str, receipt: object) -> Receipt:
        """Check a receipt. Raises `Problem` 422 if it is not of this adapter and model."""
        text = receipt if isinstance(receipt, str) and len(receipt) <= _LONGEST else ""
        try:
            data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            packed, tag = data[: _PACKED.size], data[_PACKED.size :]
            version, probability, nonce = _PACKED.unpack(packed)
        except (ValueError, binascii.Error, struct.error):
            raise _unknown() from None
        if not hmac.compare_digest(tag, self._tag(model, packed)):
            raise _unknown()
        return Receipt(version, probability, nonce.hex())

    def _tag(self, model: str, packed: bytes) -> bytes:
        return hmac.digest(self._key, model.encode() + b"\0" + packed, "sha256")[:_TAG_BYTES]


def _unknown() -> Problem:
    return Problem(
        422, "the receipt is none of this adapter's", field="receipt", allowed="as answered"
    )


class Outcomes:
    """Outcomes of one model, in an append-only file of JSON lines.

    Args:
        file: Read if it is there.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))

    def add(self, receipt: Receipt, *, outcome: bool, groups: Mapping[str, str]) -> None:
        """Keep one outcome, durably. Raises `Problem` 409 if the receipt was used before."""
        if receipt.nonce in self._seen:
            raise Problem(409, "an outcome for this receipt is known already")
        row = {
            "nonce": receipt.nonce,
            "version": receipt.version,
            "probability": receipt.probability,
            "outcome": outcome,
            "groups": dict(groups),
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(row)

    def report(self, version: int, *, threshold: float) -> dict[str, Any]:
        """Calibration and subgroup rates of one version, as JSON values."""
        rows = [row for row in self._rows if row["version"] == version]
        if not rows:
            return {"outcomes": 0}
        probabilities = np.array([row["probability"] for row in rows])
        outcomes = np.array([row["outcome"] for row in rows], bool)
        names = sorted({name for row in rows for name in row["groups"]})
        return {
            "outcomes": len(rows),
            "brier": brier(probabilities, outcomes),
            "ece": calibration_error(probabilities, outcomes),
            "rates": rates(probabilities >= threshold, outcomes),
            "subgroups": {
                name: by_group(
                    probabilities >= threshold,
                    outcomes,
                    [row["groups"].get(name, "not stated") for row in rows],
                )
                for name in names
            },
        }

    def _keep(self, row: dict[str, Any]) -> None:
        self._seen.add(row["nonce"])
        self._rows.append(row)


def parse_outcome(value: Mapping[str, Any]) -> tuple[bool, dict[str, str]]:
    """The outcome and the groups of a request. Raises `Problem` 422."""
    outcome, groups = value.get("outcome"), value.get("groups", {})
    if not isinstance(outcome, bool):
        raise Problem(422, "outcome must be true or false", field="outcome", allowed="true, false")
    if (
        not isinstance(groups, dict)
        or len(groups) > _MOST_GROUPS
        or not all(isinstance(v, str) and len(k) + len(v) <= _LONGEST for k, v in groups.items())
    ):
        raise Problem(
            422,
            "groups must be a few short texts by name",
            field="groups",
            allowed='such as {"sex": "female"}',
        )
    return outcome, groups


def brier(probabilities: NDArray[np.float64], outcomes: NDArray[np.bool_]) -> float:
    """Mean squared distance of probability and outcome."""
    return float(np.mean((probabilities - outcomes) ** 2))


def calibration_error(probabilities: NDArray[np.float64], outcomes: NDArray[np.bool_]) -> float:
    """Expected calibration error over ten equal bins (Naeini et al., AAAI 2015)."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    error = 0.0
    for b in range(_BINS):
        inside = bins == b
        if inside.any():
            gap = abs(probabilities[inside].mean() - outcomes[inside].mean())
            error += float(inside.mean() * gap)
    return error


def rates(positive: NDArray[np.bool_], outcomes: NDArray[np.bool_]) -> dict[str, float | int]:
    """TPR, FPR, PPV and selection rate; a rate over nobody is left out."""
    shares = {
        "tpr": (positive & outcomes, outcomes),
        "fpr": (positive & ~outcomes, ~outcomes),
        "ppv": (positive & outcomes, positive),
        "selection_rate": (positive, np.ones_like(positive)),
    }
    found: dict[str, float | int] = {"count": len(outcomes)}
    for name, (part, whole) in shares.items():
        if whole.any():
            found[name] = float(part.sum() / whole.sum())
    return found


def by_group(
    positive: NDArray[np.bool_], outcomes: NDArray[np.bool_], groups: list[str]
) -> dict[str, dict[str, float | int]]:
    """`rates` of each group."""
    labels = np.array(groups)
    return {
        str(group): rates(positive[labels == group], outcomes[labels == group])
        for group in np.unique(labels)
    }
