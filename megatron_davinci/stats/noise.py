"""How noisy a trajectory is, without knowing its curve."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import DataError

NORMAL = 1.4826  # median absolute deviation to standard deviation, under a normal distribution


def checked_trajectory(tokens: object, values: object, what: str) -> tuple[NDArray, NDArray]:
    """A trajectory as arrays.

    Args:
        tokens: [n] positive, rising: where it was measured.
        values: [n]: what was measured.
        what: Names the trajectory in errors.

    Returns:
        Both as [n] float64.

    Raises:
        DataError: A value is not finite, or the lengths or the order do not fit.
    """
    x, y = np.asarray(tokens, np.float64), np.asarray(values, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(
            "A trajectory needs as many measurements as positions.",
            where=what,
            found=f"{x.shape} positions, {y.shape} values",
        )
    bad = np.flatnonzero(~np.isfinite(y))
    if len(bad):
        raise DataError(
            "An evaluation is not a number.",
            where=f"{what}, at {x[bad[0]]:,.0f} tokens",
            found=f"{y[bad[0]]}",
            expected="a finite loss or score",
            do="look at the checkpoint that was evaluated; nothing is decided from such a value",
        )
    if len(x) and (not np.all(np.isfinite(x)) or x[0] <= 0 or np.any(np.diff(x) <= 0)):
        raise DataError(
            "The positions of a trajectory are token counts above 0, each above the one before.",
            where=what,
            found=f"{x.tolist()[:8]}",
        )
    return x, y


def robust_scale(residuals: NDArray) -> float:
    """The standard deviation of the bulk of `residuals`: 1.4826 times their median distance from 0."""
    return float(NORMAL * np.median(np.abs(residuals))) if len(residuals) else 0.0


def difference_noise(x: NDArray, y: NDArray) -> float:
    """The standard deviation of noise around any smooth curve, from how far points lie off their neighbours' line.

    Each inner point is compared with the straight line through the points beside it, scaled so that independent
    noise of variance 1 gives pseudo-residuals of variance 1 (Gasser, Sroka and Jennen-Steinmetz, 1986). The median
    makes it deaf to outliers and to a step. Noise that is correlated from one evaluation to the next is
    underestimated.

    Args:
        x: [n] rising.
        y: [n].

    Returns:
        In units of `y`; 0 for fewer than 3 points.
    """
    if len(x) < 3:
        return 0.0
    left = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])
    right = 1 - left
    off = left * y[:-2] + right * y[2:] - y[1:-1]
    return robust_scale(off / np.sqrt(left**2 + right**2 + 1))


def autocorrelation(residuals: NDArray) -> float:
    """Lag-1 autocorrelation, 0 to 0.9; negative counts as 0: it would claim more points than there are."""
    centred = residuals - residuals.mean()
    power = float(centred @ centred)
    if power <= 0 or len(residuals) < 4:
        return 0.0
    # The estimate is biased towards -1/n (Kendall, 1954).
    return float(np.clip(centred[1:] @ centred[:-1] / power + 1 / len(residuals), 0.0, 0.9))


def effective_count(residuals: NDArray) -> float:
    """How many independent points the residuals are worth, as an AR(1) sequence: n (1 - rho) / (1 + rho)."""
    rho = autocorrelation(residuals)
    return len(residuals) * (1 - rho) / (1 + rho)
