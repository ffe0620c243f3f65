"""Noise for many sites at once: what `add_noise` does, row by row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import NoiseSource, drawing, noise_step, release_steps
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
    settings = list(zip(stds, sensitivities, strict=True))
    given = np.require(rows, requirements=("C", "A", "W"))
    released = np.empty(rows.shape, np.float32)
    drawn = np.empty(rows.shape, np.int32)
    for row, source in zip(drawn, sources, strict=True):
        if isinstance(source, SimulatedSource):  # half of the time that a request takes
            source.fill_steps(row)
            continue
        with drawing(source, row.size) as draw:
            draw(row)
    # Most sites have the same settings; one call for all of them costs little more than for one.
    alike = len(set(settings)) == 1
    for (std, sensitivity), at in (
        [(settings[0], slice(None))] if alike else zip(settings, range(len(settings)), strict=True)
    ):
        step = noise_step(std, sensitivity=sensitivity, size=rows.shape[1])
        release_steps(given[at].reshape(-1), drawn[at].reshape(-1), step, released[at].reshape(-1))
    drawn.fill(0)
    return released
