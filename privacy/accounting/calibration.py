"""How much noise a budget asks for."""

import functools
import math
from collections.abc import Callable

from fedward.privacy.accounting.events import (
    DpEvent,
    compose,
    dp_sgd_event,
    gaussian_event,
    leaves,
)
from fedward.privacy.accounting.pricing import best_epsilon

SMALLEST_NOISE = 0.1
LARGEST_NOISE = 1e5
_STEP = 1e-4
_TRIES = 60
_FAR = 10.0
_CLOSE_ENOUGH = 1e-5


@functools.lru_cache(maxsize=256)
def calibrate(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    beside_epsilon: float | None = None,
) -> float:
    """The noise multiplier with which DP-SGD spends at most `epsilon` at `delta`, by PLD.

    Rounded up to four decimals (relative to 1, or to the noise multiplier if that is larger), so
    that the budget is kept and less than 1e-3 of it is given away.

    Args:
        epsilon: The budget, > 0.
        delta: In (0, 1).
        sample_rate: Probability with which each unit takes part in a step, in (0, 1].
        steps: Steps of the whole run, >= 1.
        beside_epsilon: What one Gaussian release to the same patients costs by itself; DP-SGD
            leaves room for it, so that both together spend at most `epsilon`.

    Returns:
        At least 0.1: less noise than that is not worth the name.

    Raises:
        ValueError: An argument is outside its range, or no noise multiplier below 1e5 is enough.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    beside: list[DpEvent] = []
    if beside_epsilon is not None:
        if not beside_epsilon < epsilon:
            raise ValueError(f"{beside_epsilon} leaves nothing of epsilon {epsilon} for training")
        beside = [gaussian_event(calibrate_gaussian(epsilon=beside_epsilon, delta=delta))]

    def whole(noise: float) -> DpEvent:
        steps_alone = dp_sgd_event(noise_multiplier=noise, sample_rate=sample_rate, steps=steps)
        return compose([steps_alone, *beside])

    return calibrate_event(whole, epsilon=epsilon, delta=delta)


@functools.lru_cache(maxsize=256)
def calibrate_gaussian(*, epsilon: float, delta: float) -> float:
    """The noise multiplier with which one Gaussian release spends at most `epsilon`."""
    return calibrate_event(gaussian_event, epsilon=epsilon, delta=delta)


def calibrate_event(event: Callable[[float], DpEvent], *, epsilon: float, delta: float) -> float:
    """The least noise multiplier for which `event(noise_multiplier)` keeps the budget.

    Epsilon falls as noise grows, so the answer is bracketed and the bracket is narrowed by
    interpolating log epsilon over log noise (regula falsi, Illinois variant). The result is
    checked at the rounded value that is returned, and rounded further up until it holds.

    Raises:
        ValueError: `epsilon` is not positive and finite, or no noise multiplier is enough.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")

    def excess(noise: float) -> float:
        spent = best_epsilon(leaves(event(noise)), delta=delta)
        return min(math.log(max(spent, 1e-12) / epsilon), _FAR)

    low, high = SMALLEST_NOISE, 1.0
    below, above = math.inf, excess(high)
    while above > 0:
        low, below = high, above
        high *= 2.0
        if high > LARGEST_NOISE:
            raise ValueError(
                f"no noise multiplier below {LARGEST_NOISE:g} keeps epsilon {epsilon} at delta "
                f"{delta}; raise epsilon or delta, or take fewer steps"
            )
        above = excess(high)
    if below is math.inf:
        below, probe = above, high
        while below <= 0:
            high, above = probe, below
            if probe == SMALLEST_NOISE:
                return SMALLEST_NOISE
            probe = max(SMALLEST_NOISE, probe / 2)
            below = excess(probe)
        low = probe
    low, high = _narrow(excess, low, high, below, above)
    return _round_up(excess, high)


def _narrow(
    excess: Callable[[float], float], low: float, high: float, below: float, above: float
) -> tuple[float, float]:
    """Shrink a bracket, `excess(low) > 0 >= excess(high)`, to the rounding step."""
    side = 0
    for _ in range(_TRIES):
        if high - low <= _step(high) / 4:
            break
        share = below / (below - above)
        middle = low * (high / low) ** min(max(share, 0.01), 0.99)
        value = excess(middle)
        if value > 0:
            low, below = middle, value
            above *= 0.5 if side == 1 else 1.0
            side = 1
        else:
            high, above = middle, value
            below *= 0.5 if side == -1 else 1.0
            side = -1
            if value > -_CLOSE_ENOUGH:
                break
    return low, high


def _step(noise: float) -> float:
    return _STEP * max(1.0, 10.0 ** math.floor(math.log10(noise)))


def _round_up(excess: Callable[[float], float], noise: float) -> float:
    step = _step(noise)
    steps = math.ceil(round(noise / step, 6))
    while excess(round(steps * step, 12)) > 0:
        steps += 1
    return round(steps * step, 12)
