"""The last update of a study, kept until the next: a lost answer is sent again, not trained again.

The same bytes tell the coordinator nothing new, so to send them again costs no budget.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedward.core.files import write_atomic
from fedward.strategies.strategy import Vector


class Kept(NamedTuple):
    """An update that was ready to leave.

    Attributes:
        round_number: Its round.
        asked: SHA-256 of the parameters that it was trained from.
        update: Shape `(num_parameters,)`.
    """

    round_number: int
    asked: str
    update: Vector


class Keeper(Protocol):
    """Keeps a site's last update."""

    def keep(self, kept: Kept) -> None:
        """Replace what was kept."""
        ...

    def newest(self) -> Kept | None:
        """What was kept last; None if there is nothing, or nothing whole."""
        ...


@dataclass(frozen=True, slots=True)
class Outbox:
    """One study's outbox on disk.

    Args:
        file: Where the update is kept.
    """

    file: Path

    def keep(self, kept: Kept) -> None:
        """Replace what was kept.

        Not flushed to disk: a power cut may lose it, and then the round is paid for again.
        """
        arrays = save({f"{kept.round_number}/{kept.asked}": kept.update})
        write_atomic(self.file, arrays, durable=False)

    def newest(self) -> Kept | None:
        """What was kept last; None if there is nothing, or nothing whole."""
        try:
            arrays = load(self.file.read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None
        (name, update), *_ = arrays.items()
        number, _, asked = name.partition("/")
        return Kept(int(number), asked, update)
