"""Noise for many sites at once: what `add_noise` does, row by row, in a few operations for all."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import (
    BLOCK,
    NoiseSource,
    add_noise,
    draw_steps,
    in_singles,
    noise_step,
    steps_per_unit,
    whole_sums,
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
    settings = list(zip(stds, sensitivities, strict=True))
    # Most sites have the same ones.
    found = {pair: noise_step(pair[0], sensitivity=pair[1], size=size) for pair in set(settings)}
    if not rows.size or size > BLOCK:
        released = [
            add_noise(row, std=std, sensitivity=sensitivity, source=source)
            for row, (std, sensitivity), source in zip(rows, settings, sources, strict=True)
        ]
        return np.array(released, dtype=np.float32).reshape(rows.shape)
    steps = [found[pair] for pair in settings]
    largest = np.maximum(-rows.min(axis=1), rows.max(axis=1)).tolist()
    singles = np.array(
        [
            in_singles(most, step, dtype=rows.dtype)
            for most, step in zip(largest, steps, strict=True)
        ]
    )
    scales = np.array([steps_per_unit(step) for step in steps], np.float32)[:, None]
    drawn = _drawn_steps(rows.shape, sources)
    sums = np.empty(rows.shape, np.float32)
    for kind in set(singles.tolist()):
        these = singles == kind
        sums[these] = whole_sums(rows[these], drawn[these], scales[these], singles=kind)
    sums *= np.array(steps, np.float32)[:, None]
    return sums


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
