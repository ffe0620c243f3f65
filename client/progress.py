"""Where a round of training stands, on the site's disk, so that a site that stops goes on.

A reservation permits one training. A round that is taken up where it stopped is that training:
the steps up to the saved state are not taken again, and of the steps after it that were lost
nothing has left the site. Noise is drawn anew, so no two outcomes share any.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedward.client.training import TrainingState
from fedward.core.files import write_atomic

_SECONDS = 2.0  # of training that a crash may cost; saving takes milliseconds


@dataclass(slots=True)
class Progress:
    """One reservation's training.

    Args:
        file: Where its state is kept. Private: it stays at the site.
        reservation: Number of the ledger's entry that pays for it.
        asked: SHA-256 of the parameters that it started from.
        seconds: How much training may be lost.
    """

    file: Path
    reservation: int
    asked: str
    seconds: float = _SECONDS
    _saved: float = field(default_factory=time.monotonic)

    def keep(self, state: TrainingState) -> None:
        """Keep a state, if the last one is old enough."""
        if time.monotonic() - self._saved < self.seconds:
            return
        named = {
            "reservation": str(self.reservation),
            "asked": self.asked,
            "steps": str(state.steps),
            "clip_norm": state.clip_norm.hex(),
            "sanitised": str(state.sanitised),
        }
        write_atomic(self.file, save(state.arrays, metadata=named), mode=0o600)
        self._saved = time.monotonic()

    def newest(self) -> TrainingState | None:
        """The state to go on from; None if there is none of this very training, or none whole."""
        try:
            with safe_open(self.file, framework="np") as opened:
                named = opened.metadata() or {}
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, SafetensorError):
            return None
        if (named.get("reservation"), named.get("asked")) != (str(self.reservation), self.asked):
            return None
        return TrainingState(
            steps=int(named["steps"]),
            clip_norm=float.fromhex(named["clip_norm"]),
            sanitised=int(named["sanitised"]),
            arrays=arrays,
        )

    def forget(self) -> None:
        """The training has ended."""
        self.file.unlink(missing_ok=True)
