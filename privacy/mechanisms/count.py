"""How many there are, without saying so exactly."""

import numpy as np

from fedward.privacy.accounting import DpEvent, gaussian_event
from fedward.privacy.mechanisms.noise import NoiseSource, add_noise


def release_count(
    count: int, *, noise_multiplier: float, source: NoiseSource
) -> tuple[int, DpEvent]:
    """A number of units with Gaussian noise, and the event to reserve for it *before* calling.

    One unit more or less moves a count by 1, so the noise multiplier is its standard deviation.
    Rounding to a whole number that is not negative is post-processing.

    Args:
        count: How many units there are, >= 0: of the unit that the event is priced for.
        noise_multiplier: Standard deviation of the noise, > 0; `calibrate_gaussian` gives it.
        source: Where the noise comes from.

    Returns:
        The count to release, and what it cost.

    Raises:
        ValueError: `count` is negative, or `noise_multiplier` is not positive and finite.
    """
    if count < 0:
        raise ValueError(f"a count is not negative, got {count}")
    event = gaussian_event(noise_multiplier)
    noisy = add_noise(
        np.array([count], dtype=np.float64), std=noise_multiplier, sensitivity=1.0, source=source
    )
    return max(0, round(float(noisy[0]))), event
