"""Checkpoints: a run that was killed goes on from the last finished round."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedward.core.errors import RunError
from fedward.core.files import write_atomic
from fedward.strategies.averaging import IterateAverage
from fedward.strategies.strategy import State

_KEPT = 2
_PREFIX = "memory."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after `round_number` rounds."""

    round_number: int
    study_hash: str
    state: State
    average: IterateAverage


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, durable: bool = True) -> None:
    """Write one file, atomically, and drop all but the newest two; see `write_atomic`."""
    arrays: dict[str, NDArray[Any]] = {
        f"{_PREFIX}{name}": array for name, array in checkpoint.state.memory.items()
    }
    arrays["parameters"] = checkpoint.state.parameters
    if checkpoint.average.mean is not None:
        arrays["average"] = checkpoint.average.mean
    head = {
        "format": 1,
        "round": checkpoint.round_number,
        "study": checkpoint.study_hash,
        "first_round": checkpoint.average.first_round,
        "count": checkpoint.average.count,
    }
    data = save(arrays, metadata={"fedward": json.dumps(head)})
    file = folder / f"round-{checkpoint.round_number:06d}.safetensors"
    write_atomic(file, data, durable=durable)
    for old in sorted(folder.glob("round-*.safetensors"))[:-_KEPT]:
        old.unlink()


def load_checkpoint(folder: Path, *, study_hash: str) -> Checkpoint | None:
    """Read the newest checkpoint; None where the run has none.

    Raises:
        RunError: It is damaged, or belongs to another study.
    """
    files = sorted(folder.glob("round-*.safetensors"))
    if not files:
        return None
    try:
        arrays = load_file(files[-1])
        head = _metadata(files[-1])
        parameters = arrays["parameters"].astype(np.float32)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RunError(
            f"{files[-1]} is damaged ({error}); remove it to resume from the round before"
        ) from error
    if head.get("format") != 1 or head["study"] != study_hash:
        raise RunError(
            f"{files[-1]} belongs to another study; resume with the study that the run began with"
        )
    memory = {n.removeprefix(_PREFIX): a for n, a in arrays.items() if n.startswith(_PREFIX)}
    return Checkpoint(
        round_number=head["round"],
        study_hash=head["study"],
        state=State(parameters=parameters, memory=memory),
        average=IterateAverage(head["first_round"], arrays.get("average"), head["count"]),
    )


def _metadata(file: Path) -> dict[str, Any]:
    # A safetensors file starts with the length of its JSON header (8 bytes, little-endian).
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    head: dict[str, Any] = json.loads(header["__metadata__"]["fedward"])
    return head
