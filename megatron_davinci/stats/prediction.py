"""What early checkpoints say of late ones: of one run, and of which of several runs will be ahead.

Intermediate checkpoints are followed as in The Fine Line (arXiv 2404.01204). That an early measurement decides right
is counted as in DataDecide (Magnusson et al., arXiv 2504.11393): the share of pairs of runs whose order it has as it
is at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.stats.noise import difference_noise
from megatron_davinci.stats.rankings import kendall_tau


@dataclass(frozen=True)
class Decision:
    """How an early measurement orders runs, against the end.

    Attributes:
        tau: Kendall's tau-b; NaN where either has all alike.
        right: Share of the pairs that are apart at the end whose order was right; a tie counts half.
        pairs: How many those are.
    """

    tau: float
    right: float
    pairs: int


def decision(early: ArrayLike, final: ArrayLike) -> Decision:
    """How well an early measurement of runs has their order at the end.

    Args:
        early: [runs], more being better, as in `final`.
        final: [runs].
    """
    x, y = np.asarray(early, np.float64), np.asarray(final, np.float64)
    first, second = np.triu_indices(len(x), 1)
    a, b = np.sign(x[second] - x[first]), np.sign(y[second] - y[first])
    apart = b != 0
    right = float(np.mean((1 + a[apart] * b[apart]) / 2)) if apart.any() else float("nan")
    return Decision(float(kendall_tau(x, y)), right, int(apart.sum()))


@dataclass(frozen=True)
class EarlyForecast:
    """A metric's last value, from the first part of its trajectory.

    Attributes:
        checkpoints: How many it was forecast from.
        last: The last value.
        naive: Error of the last of them, taken as it is.
        trend: Error of a straight line over the logarithm of tokens through all of them.
        noise: Standard deviation of one measurement around any smooth curve.
    """

    checkpoints: int
    last: float
    naive: float
    trend: float
    noise: float


def early_forecast(tokens: ArrayLike, values: ArrayLike, share: float = 0.5) -> EarlyForecast | None:
    """Forecast a trajectory's last value from its first part, and say how wrong that was.

    Args:
        tokens: [n] above 0, rising.
        values: [n] finite.
        share: Of the tokens, which the first part has.

    Returns:
        None for fewer than three checkpoints in the first part, or none after it.
    """
    x, y = np.asarray(tokens, np.float64), np.asarray(values, np.float64)
    early = x <= share * x[-1]
    if early.sum() < 3 or early.all():
        return None
    slope, level = np.polyfit(np.log(x[early]), y[early], 1)
    return EarlyForecast(
        checkpoints=int(early.sum()),
        last=float(y[-1]),
        naive=float(y[early][-1] - y[-1]),
        trend=float(level + slope * np.log(x[-1]) - y[-1]),
        noise=difference_noise(x, y),
    )


def leaves_chance(scores: ArrayLike, chance: float, confidence: float = 0.95) -> int | None:
    """The checkpoint from which on a task is above chance.

    Args:
        scores: [checkpoints, items], 1 where right.
        chance: Of guessing.
        confidence: Of each checkpoint's interval, by Wilson's formula (1927).

    Returns:
        The first whose interval, and that of all later ones, lies above chance; None for none.
    """
    from scipy.stats import norm

    x = np.asarray(scores, np.float64)
    z, n, p = float(norm.ppf((1 + confidence) / 2)), x.shape[1], x.mean(1)
    low = (p + z**2 / (2 * n) - z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)
    below = np.flatnonzero(low <= chance + 1e-9)
    first = int(below[-1]) + 1 if len(below) else 0
    return first if first < len(x) else None


def agreement_with_last(values: ArrayLike) -> NDArray[np.float64]:
    """How far items are in the order that they have at the last checkpoint.

    Args:
        values: [checkpoints, items].

    Returns:
        [checkpoints]: Kendall's tau-b over items, each checkpoint with the last; NaN where all are alike.
    """
    from scipy.stats import kendalltau

    x = np.asarray(values, np.float64)
    return np.array([float(kendalltau(row, x[-1]).statistic) for row in x])
