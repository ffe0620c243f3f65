"""Noise for many sites at once: what `add_noise` does, row by row, in a few operations for all."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import NoiseSource, grid_step


def add_noise_to_rows(
    rows: NDArray[np.float32], *, stds: Sequence[float], sources: Sequence[NoiseSource]
) -> NDArray[np.float32]:
    """Release each row with noise of its own: to the bit what `add_noise` gives for that row.

    For simulations, in which the rows are sites that live in one process.

    Args:
        rows: Shape `(sites, size)`, already clipped.
        stds: Standard deviation of the noise on each element, > 0, one a row.
        sources: Where the noise of each row comes from.

    Raises:
        ValueError: A standard deviation is not positive and finite, or a row is not finite.
    """
    if not (all(std > 0 for std in stds) and np.isfinite(stds).all()):
        raise ValueError("std must be positive and finite at every site")
    if not np.isfinite(rows).all():
        raise ValueError("a vector that is not finite cannot be released with noise")
    noisy = np.empty(rows.shape)
    for row, std, source in zip(noisy, stds, sources, strict=True):
        row[:] = source.gaussian(row.size, std=std)
    steps = np.array([grid_step(std) for std in stds])[:, None]
    noisy += rows
    noisy *= 1.0 / steps
    np.rint(noisy, out=noisy)
    noisy *= steps
    return noisy.astype(np.float32)
