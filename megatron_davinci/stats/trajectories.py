"""What a benchmark's trajectory over checkpoints is worth: signal against noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

LAST = 5  # checkpoints that noise is measured on


def signal_to_noise(values: ArrayLike, last: int = LAST) -> float:
    """How far a metric moves over a run, against how it jumps about at its end.

    Signal is the largest difference between two checkpoints over the mean of all; noise is the standard deviation
    of the last checkpoints over their mean (as Heineman et al., arXiv 2508.13144, have it between models). Where a
    metric still rises at the end, its rise counts as noise: the ratio is then too low rather than too high.

    Args:
        values: [n], in the order of the checkpoints.
        last: How many of them noise is measured on.

    Returns:
        The ratio; NaN for fewer than `last + 1` checkpoints or a mean of 0; infinite where the end does not move.
    """
    x = np.asarray(values, np.float64)
    if len(x) < last + 1 or last < 2 or x.mean() == 0 or x[-last:].mean() == 0:
        return float("nan")
    signal = (x.max() - x.min()) / abs(x.mean())
    noise = x[-last:].std(ddof=1) / abs(x[-last:].mean())
    return float(signal / noise) if noise > 0 else float("inf")
