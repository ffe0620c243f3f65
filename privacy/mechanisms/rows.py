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
    drawn = np.empty(rows.shape, dtype=np.int32)
    for row, source in zip(drawn, sources, strict=True):
        draw_steps(row, source=source)
    scaled = rows * np.array([steps_per_unit(step) for step in steps], np.float32)[:, None]
    np.rint(scaled, out=scaled)
    drawn += scaled.astype(np.int32)
    np.copyto(scaled, drawn)
    scaled *= np.array(steps, np.float32)[:, None]
    return scaled
