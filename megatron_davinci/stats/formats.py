"""How much a score depends on how the same items are put, beside the noise of items.

Items and formats are the two factors of an analysis of variance without repetition. The formats' means differ by
what the formats do, and by an item's whims in one format or another; the second is the residual's share, and is
taken off. Whether anything is left is Cochran's Q (1950), which for scores of 0 and 1 asks whether formats could be
exchanged within every item.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class FormatSpread:
    """What formats do to a score.

    Attributes:
        means: By format.
        items: How many each asked.
        deviation: Standard deviation of the means.
        beyond_noise: Standard deviation that formats have of their own, the items' whims taken off; 0 for none.
        item_error: Standard error of one format's mean that comes from which items were asked: the formats' mean.
        p: Of formats that can be exchanged, by Cochran's Q.
    """

    means: list[float]
    items: int
    deviation: float
    beyond_noise: float
    item_error: float
    p: float

    @property
    def range(self) -> float:
        """The highest mean less the lowest."""
        return max(self.means) - min(self.means)


def format_spread(scores: ArrayLike) -> FormatSpread:
    """What formats do to a score.

    Args:
        scores: [formats, items], at least two of each.

    Raises:
        ValueError: There are fewer, or a score is not finite.
    """
    from scipy.stats import chi2

    x = np.asarray(scores, np.float64)
    if x.ndim != 2 or min(x.shape) < 2 or not np.isfinite(x).all():
        raise ValueError(f"two formats and two items at least, all finite: {x.shape}")
    formats, items = x.shape
    means = x.mean(1)
    of_formats = items * float(((means - x.mean()) ** 2).sum())
    within_items = float(((x - x.mean(0)) ** 2).sum())
    residual = max(0.0, within_items - of_formats) / ((formats - 1) * (items - 1))
    variance = float(means.var(ddof=1))
    # Cochran's Q: (k - 1) sum_j (G_j - mean G)^2 over sum_ij (x_ij - mean_i)^2, G_j being a format's sum.
    q = (formats - 1) * items * of_formats / within_items if within_items else 0.0
    return FormatSpread(
        means=means.tolist(),
        items=items,
        deviation=sqrt(variance),
        beyond_noise=sqrt(max(0.0, variance - residual / items)),
        item_error=float((x.std(axis=1, ddof=1) / sqrt(items)).mean()),
        p=float(chi2.sf(q, formats - 1)) if within_items else 1.0,
    )
