"""Whether an effect shrinks or turns with scale: paired differences against the logarithm of size.

A line through the differences of all pairs at all sizes; its slope with Student's interval; where it crosses zero, by
Fieller's (1954) interval, which has no end where the slope is not sure. That a line holds beyond the sizes that were
run is an assumption, so what it predicts is said as a warning and never as a verdict. Effects that won at a small
size have lost at a large one (2409.15156).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

REACH = 10.0
"""How far beyond the largest size a crossing is warned of: this many times it."""


@dataclass(frozen=True)
class Trend:
    """How an effect changes over sizes.

    Attributes:
        slope: Change of the difference with a tenfold size.
        low: Lower end of its interval.
        high: Upper end.
        smallest: The line's difference at the smallest size.
        largest: At the largest.
        smallest_size: Parameters, or whatever the scale counts.
        largest_size: The same of the largest.
        crossing: The size at which the line is zero; None where the slope is not sure.
        crossing_low: Lower end of its interval; 0 where it has none.
        crossing_high: Upper end; infinite where it has none.
        pairs: Points.
    """

    slope: float
    low: float
    high: float
    smallest: float
    largest: float
    smallest_size: float
    largest_size: float
    crossing: float | None
    crossing_low: float
    crossing_high: float
    pairs: int

    @property
    def sure(self) -> bool:
        """Whether the effect changes with size at all."""
        return self.low > 0 or self.high < 0

    @property
    def turns(self) -> bool:
        """Whether it is one thing at the smallest size and the reverse at the largest, of those that were run."""
        return self.sure and self.crossing is not None and self._inside(self.crossing)

    @property
    def shrinks(self) -> bool:
        """Whether it heads for zero, to be there within ten times the largest size, or has lost half already."""
        if not self.sure or self.turns or abs(self.largest) >= abs(self.smallest):
            return False
        assert self.crossing is not None
        near = self.largest_size < self.crossing <= REACH * self.largest_size
        return near or abs(self.largest) < abs(self.smallest) / 2

    def _inside(self, size: float) -> bool:
        return self.smallest_size < size < self.largest_size


def trend(differences: Mapping[float, Sequence[float]], confidence: float = 0.95) -> Trend | None:
    """The line through paired differences over sizes.

    Args:
        differences: By size: one for each pair of runs, ours less theirs.
        confidence: Of the intervals.

    Returns:
        None with fewer than two sizes, or no more than two points.
    """
    from scipy.stats import t

    points = [(float(size), float(one)) for size, values in differences.items() for one in values]
    sizes = sorted({size for size, _ in points})
    if len(sizes) < 2 or len(points) < 3:
        return None
    x = np.log10([size for size, _ in points])
    y = np.array([one for _, one in points])
    middle, count = float(x.mean()), len(x)
    spread = float(((x - middle) ** 2).sum())
    slope = float(((x - middle) * y).sum() / spread)
    level = float(y.mean())
    left = y - level - slope * (x - middle)
    variance = float(left @ left) / (count - 2)
    bound = float(t.ppf((1 + confidence) / 2, count - 2))
    half = bound * sqrt(variance / spread)
    first, last = np.log10(sizes[0]), np.log10(sizes[-1])
    crossing, low, high = None, 0.0, inf
    if abs(slope) > half:
        crossing = 10.0 ** min(middle - level / slope, 300.0)
        # Where the line's own interval holds zero: the roots of a quadratic, both real as the slope is sure.
        a = slope**2 - half**2
        c = level**2 - bound**2 * variance / count
        root = sqrt(max((slope * level) ** 2 - a * c, 0.0))
        low, high = (
            10.0 ** float(np.clip(middle + (-slope * level + sign * root) / a, -300, 300)) for sign in (-1, 1)
        )
    return Trend(
        slope=slope,
        low=slope - half,
        high=slope + half,
        smallest=level + slope * float(first - middle),
        largest=level + slope * float(last - middle),
        smallest_size=sizes[0],
        largest_size=sizes[-1],
        crossing=crossing,
        crossing_low=low,
        crossing_high=high,
        pairs=count,
    )
