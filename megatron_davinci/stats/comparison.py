"""Comparing two ways by pairs: a difference with its interval, equivalence within a margin, power, many at once.

Pairs are runs of one seed: same initial weights, same data order. Their differences are taken as normal, so that
Student's t holds for few of them (Student, 1908). Equivalence is by two one-sided tests (Schuirmann, 1987), several
comparisons by Holm's step-down (1979), power by the noncentral t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import numpy as np


@dataclass(frozen=True)
class Paired:
    """A mean difference of pairs, ours less theirs.

    Attributes:
        mean: The mean.
        low: Lower end of the interval; minus infinity with one pair.
        high: Upper end.
        deviation: Standard deviation of a pair's difference; 0 with one pair.
        each: The differences, by pair.
        confidence: Of the interval.
    """

    mean: float
    low: float
    high: float
    deviation: float
    each: dict[int, float]
    confidence: float = 0.95

    @property
    def pairs(self) -> int:
        """How many."""
        return len(self.each)

    @property
    def p_difference(self) -> float:
        """Two-sided p-value of no difference; 1 with one pair."""
        from scipy.stats import t

        if self.pairs < 2:
            return 1.0
        if self.deviation == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * t.sf(abs(self.mean) / self._error, self.pairs - 1))

    def p_equivalence(self, margin: float) -> float:
        """p-value of a difference of at least the margin, either way: the larger of the two one-sided ones.

        Args:
            margin: Above 0, in the unit of the values.
        """
        from scipy.stats import t

        if self.pairs < 2:
            return 1.0
        if self.deviation == 0:
            return 0.0 if abs(self.mean) < margin else 1.0
        return float(t.sf((margin - abs(self.mean)) / self._error, self.pairs - 1))

    @property
    def _error(self) -> float:
        return self.deviation / sqrt(self.pairs)


def half_width(deviation: float, count: int, confidence: float = 0.95) -> float:
    """Half of Student's interval of a mean: `t * deviation / sqrt(count)`; infinite for one value.

    Args:
        deviation: Standard deviation of the values.
        count: How many there are.
        confidence: Of the interval.
    """
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, count - 1)) * deviation / sqrt(count) if count > 1 else inf


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95) -> Paired:
    """Compare by the pairs that both have.

    Args:
        ours: Values by seed.
        theirs: Values by seed.
        confidence: Of the interval.

    Raises:
        ValueError: They share no seed, or a value is not finite.
    """
    shared = sorted(set(ours) & set(theirs))
    each = {seed: float(ours[seed]) - float(theirs[seed]) for seed in shared}
    values = np.array(list(each.values()))
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"no pairs of finite values: {each}")
    mean = float(values.mean())
    if len(values) < 2:
        return Paired(mean, -inf, inf, 0.0, each, confidence)
    deviation = float(values.std(ddof=1))
    half = half_width(deviation, len(values), confidence)
    return Paired(mean, mean - half, mean + half, deviation, each, confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false rejection among them stays below the level.

    Args:
        p_values: Of all comparisons that are asked at once.

    Returns:
        Adjusted values, in the same order.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - place) * float(p_values[index])))
        adjusted[index] = highest
    return adjusted


def power(effect: float, deviation: float, pairs: int, alpha: float = 0.05) -> float:
    """The chance that a paired t-test at `alpha` finds an effect.

    Args:
        effect: The true mean difference.
        deviation: Standard deviation of a pair's difference.
        pairs: How many.
        alpha: Level, two-sided.

    Raises:
        ValueError: The effect or the deviation is no finite number, the deviation is below 0, or the level is none.
    """
    from scipy.stats import nct, t

    if not (isfinite(effect) and 0 <= deviation < inf and 0 < alpha < 1):
        raise ValueError(f"no power: an effect of {effect}, a deviation of {deviation}, a level of {alpha}")
    if pairs < 2:
        return 0.0
    if deviation == 0:
        return 1.0 if effect else alpha
    bound, shift = float(t.ppf(1 - alpha / 2, pairs - 1)), abs(effect) * sqrt(pairs) / deviation
    above, below = float(nct.sf(bound, pairs - 1, shift)), float(nct.cdf(-bound, pairs - 1, shift))
    # Far out in a tail the noncentral t is not computed: there the test finds the effect, and never its reverse.
    return (above if isfinite(above) else 1.0) + (below if isfinite(below) else 0.0)


def pairs_needed(
    effect: float, deviation: float, wanted: float = 0.8, alpha: float = 0.05, most: int = 1000
) -> int | None:
    """The fewest pairs that find an effect with the wanted power; None where `most` do not.

    Args:
        effect: The true mean difference, not 0.
        deviation: Standard deviation of a pair's difference.
        wanted: Power.
        alpha: Level, two-sided.
        most: How many are looked at.

    Raises:
        ValueError: As of `power`; or the effect is 0, which no test finds.
    """
    if effect == 0:
        raise ValueError("no number of pairs finds an effect of 0")
    low, high = 2, 2
    while power(effect, deviation, high, alpha) < wanted:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        if power(effect, deviation, middle, alpha) < wanted:
            low = middle + 1
        else:
            high = middle
    return high


def pooled_deviation(found: Sequence[Paired]) -> float | None:
    """The noise of a pair's difference over several comparisons, each weighted by its degrees of freedom."""
    known = [one for one in found if one.pairs > 1]
    freedom = sum(one.pairs - 1 for one in known)
    if not freedom:
        return None
    return sqrt(sum((one.pairs - 1) * one.deviation**2 for one in known) / freedom)
