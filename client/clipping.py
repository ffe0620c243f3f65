"""Where adaptive clipping of a study stands at a site, between rounds.

What a round leaves here was computed from counts with noise on them, so it says no more of a
patient than was paid for. It stays at the site nevertheless: sites differ in it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from fedward.core.files import write_atomic

_KEPT = 4  # rounds: one that is trained again starts where it started before


@dataclass(frozen=True, slots=True)
class ClipNorms:
    """The clip norms that the last rounds ended with.

    Args:
        file: Where they are kept.
        durable: Flush them to disk, as a real site does.
    """

    file: Path
    durable: bool

    def before(self, round_number: int) -> float | None:
        """What the newest round before this one ended with; None if there is none."""
        earlier = {number: norm for number, norm in self._read().items() if number < round_number}
        return earlier[max(earlier)] if earlier else None

    def keep(self, round_number: int, clip_norm: float) -> None:
        """Keep what a round ended with; what was kept of later ones is of a run that is void."""
        norms = {number: norm for number, norm in self._read().items() if number < round_number}
        norms[round_number] = clip_norm
        newest = sorted(norms)[-_KEPT:]
        text = json.dumps({str(number): norms[number].hex() for number in newest})
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(self.file, text, mode=0o600, durable=self.durable)

    def _read(self) -> dict[int, float]:
        try:
            kept = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        return {int(number): float.fromhex(norm) for number, norm in kept.items()}
