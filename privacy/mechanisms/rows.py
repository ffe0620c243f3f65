"""Noise for many sites at once: what `add_noise` does, row by row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import NoiseSource, add_in_steps, noise_step


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
    settings = list(zip(stds, sensitivities, strict=True))
    # Most sites have the same ones.
    steps = {
        (std, sensitivity): noise_step(std, sensitivity=sensitivity, size=rows.shape[1])
        for std, sensitivity in set(settings)
    }
    given = np.require(rows, requirements=("C", "A", "W"))
    released = np.empty(rows.shape, np.float32)
    for row, out, pair, source in zip(given, released, settings, sources, strict=True):
        add_in_steps(row, step=steps[pair], source=source, out=out)
    return released
