"""Whether what a run learns is still growing: the state of a trajectory, its knee, and how sure that is.

Two questions are kept apart. *Is there a knee?* weighs curves (`stats.curves`): a power law of tokens, one with a
step (a learning rate that changed), two limbs that both grow, and a limb of growth after which little is left. A
knee is claimed where the last has the probability that was asked for. Of itself a power law flattens against
tokens, and even against their logarithm; that is no knee. *How does it grow now?* compares the slope against
log-tokens at the end with the mean slope of the growth before, over all curves by their probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.stats.curves import FAMILIES, POSITIONS, CurveGrid, Posterior
from megatron_davinci.stats.noise import checked_trajectory, difference_noise, effective_count, robust_scale

State = Literal["growing", "slowing", "saturated", "unknown"]

LEAST_POINTS = 8
"""Below this many evaluations nothing is said."""
SLOWING_BELOW, SATURATED_BELOW = 0.5, 0.2
"""The state by present growth as a share of the mean growth before, both a doubling of tokens."""
KNEE_CONFIDENCE = 0.8
"""A knee is claimed from this probability on, which gives few false alarms: benchmarks/saturation.py."""
_ROUNDS = 3
_OUTLIER = 2.5  # standard deviations
_A_DOUBLING = log(2)


@dataclass(frozen=True)
class Knee:
    """A knee that was found.

    Attributes:
        tokens: Where: the token count at which the two limbs, drawn on, meet. A bend that is not sharp lies around
            it.
        low: Lower end of the 95% interval, in tokens.
        high: Upper end.
        ratio: Growth a doubling after it, as a share of the growth before.
        confidence: Probability that the trajectory has one, against the curves without.
    """

    tokens: float
    low: float
    high: float
    ratio: float
    confidence: float


@dataclass(frozen=True)
class Saturation:
    """What a trajectory says.

    Attributes:
        state: `growing`, `slowing`, `saturated`; `unknown` with too few points or no growth above the noise.
        confidence: Probability of the state, from 0 to 1.
        rate: Present improvement a doubling of tokens, in the trajectory's units; positive is better.
        rate_error: Its standard error.
        share: `rate` as a share of the mean improvement a doubling before.
        noise: Standard deviation of one evaluation around the curve.
        knee: The knee, if one was found.
        curve: [n] the fitted curve at the trajectory's positions.
        reason: Why, in words.
    """

    state: State
    confidence: float
    rate: float
    rate_error: float
    share: float
    noise: float
    knee: Knee | None
    curve: NDArray
    reason: str


def saturation(
    tokens: ArrayLike,
    values: ArrayLike,
    *,
    better: Literal["lower", "higher"],
    what: str = "trajectory",
    knee_confidence: float = KNEE_CONFIDENCE,
    positions: int = POSITIONS,
) -> Saturation:
    """The state of a trajectory.

    Args:
        tokens: [n] tokens at each evaluation, rising.
        values: [n] loss or score.
        better: `lower` for a loss, `higher` for a score.
        what: Names the trajectory in errors.
        knee_confidence: A knee is claimed from this probability on.
        positions: How many places a knee is looked for at. Fewer are faster; a state needs few.

    Raises:
        DataError: A value is not finite, or the positions do not rise.
    """
    t, y = checked_trajectory(tokens, values, what)
    if len(t) < LEAST_POINTS:
        return _unknown(t, y, f"{len(t)} evaluations; {LEAST_POINTS} are the fewest")
    x, sign, unit = np.log(t), 1.0 if better == "higher" else -1.0, float(np.ptp(y))
    if unit == 0:
        return _unknown(t, y, "every evaluation gave the same value")
    grid = CurveGrid(x, positions)
    posterior, best, noise = _robust_posterior(grid, x, sign * y / unit)
    weight = posterior.weight
    per_doubling = unit * _A_DOUBLING
    before = posterior.size[best] * grid.mean_slope[best]
    before_error = posterior.size_error[best] * grid.mean_slope[best]
    # The best of thousands of curves fits noise too: on noise alone, growth often seems to be four of its errors.
    if before < 6 * before_error:
        return _unknown(
            t,
            y,
            f"no growth above the noise: {before * per_doubling:.3g} ± {before_error * per_doubling:.2g} a doubling",
        )
    knee = _knee(grid, posterior, knee_confidence)
    rates = posterior.size * grid.end_slope
    rate = float(weight @ rates)
    error = float(np.sqrt(weight @ ((rates - rate) ** 2 + (posterior.size_error * grid.end_slope) ** 2)))
    shares = np.where(posterior.size > 0, grid.end_slope / grid.mean_slope, 0.0)
    odds: dict[State, float] = {
        "saturated": float(weight[shares < SATURATED_BELOW].sum()),
        "slowing": float(weight[(shares >= SATURATED_BELOW) & (shares < SLOWING_BELOW)].sum()),
        "growing": float(weight[shares >= SLOWING_BELOW].sum()),
    }
    state = max(odds, key=lambda key: odds[key])
    share = float(weight @ shares)
    reason = (
        f"improves by {rate * per_doubling:.3g} ± {error * per_doubling:.2g} a doubling of tokens, {share:.0%} of "
        f"the {before * per_doubling:.3g} before"
    )
    if knee is not None:
        reason += f"; knee at {knee.tokens:.3g} tokens ({knee.low:.3g} to {knee.high:.3g})"
    return Saturation(
        state=state,
        confidence=odds[state],
        rate=rate * per_doubling,
        rate_error=error * per_doubling,
        share=share,
        noise=noise * unit,
        knee=knee,
        curve=sign * unit * grid.curve(posterior, best),
        reason=reason,
    )


def _robust_posterior(grid: CurveGrid, x: NDArray, y: NDArray) -> tuple[Posterior, int, float]:
    """The posterior of a trajectory whose outliers are drawn in towards the best curve; that curve; the noise."""
    bulk, points = y, float(len(y))
    for _ in range(_ROUNDS):
        posterior = grid.weigh(bulk, points)
        best = int(np.argmax(posterior.weight))
        curve = grid.curve(posterior, best)
        noise = max(robust_scale(y - curve), difference_noise(x, y) / 2, 1e-9)
        bulk = curve + np.clip(y - curve, -_OUTLIER * noise, _OUTLIER * noise)
        points = effective_count(bulk - curve)
    posterior = grid.weigh(bulk, points)
    return posterior, int(np.argmax(posterior.weight)), noise


def _knee(grid: CurveGrid, posterior: Posterior, asked: float) -> Knee | None:
    mine = (grid.family == FAMILIES.index("knee")) & (posterior.size > 0)
    weight = np.where(mine, posterior.weight, 0.0)
    confidence = float(weight.sum())
    if confidence < asked:
        return None
    positions, inverse = np.unique(grid.at[mine], return_inverse=True)
    mass = np.bincount(inverse, weights=weight[mine]) / confidence
    # The distribution of the position, linear between the grid's positions.
    cumulative = np.cumsum(mass) - mass / 2
    low, middle, high = np.exp(np.interp([0.025, 0.5, 0.975], cumulative, positions))
    ratio = float(weight[mine] @ grid.ratio[mine] / confidence)
    return Knee(float(middle), float(low), float(high), ratio, confidence)


def _unknown(tokens: NDArray, y: NDArray, reason: str) -> Saturation:
    nan = float("nan")
    flat = np.full_like(y, y.mean()) if len(y) else y
    noise = difference_noise(tokens, y)
    return Saturation("unknown", 0.0, nan, nan, nan, noise, None, flat, reason)
