"""Noise for many sites at once: what `add_noise` does, row by row, in a few operations for all."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import (
    NoiseSource,
    add_noise,
    draw_steps,
    in_singles,
    noise_step,
    steps_per_unit,
)
from fedward.privacy.mechanisms.normal import RESOLUTION
from fedward.privacy.mechanisms.sources import SimulatedSource


def add_noise_to_rows(
    rows: NDArray[np.float32],
    *,
    stds: Sequence[float],
    sensitivities: Sequence[float],
    sources: Sequence[NoiseSource],
) -> NDArray[np.float32]:
    """Release each row with noise of its own: to the bit what `add_noise` gives for that row.

    For simulations, in which the rows are sites that live in one process.

    Args:
        rows: Shape `(sites, size)`, already clipped.
        stds: Standard deviation of the noise on each element, > 0, one a row.
        sensitivities: Of each row.
        sources: Where the noise of each row comes from.

    Raises:
        ValueError: As `add_noise`.
    """
    size = rows.shape[1]
    steps = [
        noise_step(std, sensitivity=sensitivity, size=size)
        for std, sensitivity in zip(stds, sensitivities, strict=True)
    ]
    if not (rows.size and in_singles(rows, min(steps))):
        each = zip(rows, stds, sensitivities, sources, strict=True)
        released = [
            add_noise(row, std=std, sensitivity=sensitivity, source=source)
            for row, std, sensitivity, source in each
        ]
        return np.array(released, dtype=np.float32).reshape(rows.shape)
    drawn = _drawn_steps(rows.shape, sources)
    scaled = rows * np.array([steps_per_unit(step) for step in steps], np.float32)[:, None]
    np.rint(scaled, out=scaled)
    drawn += scaled.astype(np.int32)
    np.copyto(scaled, drawn)
    scaled *= np.array(steps, np.float32)[:, None]
    return scaled


def _drawn_steps(shape: tuple[int, ...], sources: Sequence[NoiseSource]) -> NDArray[np.int32]:
    """What `draw_steps` gives for each row, to the bit."""
    drawn = np.empty(shape, dtype=np.int32)
    simulated = [source for source in sources if isinstance(source, SimulatedSource)]
    if len(simulated) < len(sources):
        for row, source in zip(drawn, sources, strict=True):
            draw_steps(row, source=source)
        return drawn
    normal = np.empty(shape)
    for row, source in zip(normal, simulated, strict=True):
        source.fill_gaussian(row, std=RESOLUTION)
    np.rint(normal, out=normal)
    np.copyto(drawn, normal, casting="unsafe")
    return drawn
