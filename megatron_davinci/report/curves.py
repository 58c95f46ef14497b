"""Curves made fit to draw: fewer points without losing an extreme, and a mean that shows the trend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def downsample(x: Floats, y: Floats, max_points: int = 2000, *, log_x: bool = False) -> NDArray[np.int64]:
    """Which points to draw: indices, increasing, at most `max_points` (of at least 4).

    The range of `x` is cut into equal intervals (equal on a log axis with `log_x`); of each, the lowest and the
    highest `y` stay, and so do the first and the last point. So every spike stays where it was. Points that are
    not finite (and, with `log_x`, not positive) are left out.

    Args:
        x: `[n]`, not decreasing.
        y: `[n]`.
        max_points: The most points to keep.
        log_x: The x axis is logarithmic.
    """
    usable = np.isfinite(x) & np.isfinite(y)
    if log_x:
        usable &= x > 0
    index = np.flatnonzero(usable)
    if len(index) <= max_points:
        return index
    at = np.log(x[index]) if log_x else x[index]
    buckets = (max_points - 2) // 2
    span = at[-1] - at[0] or 1.0
    bucket = np.minimum(((at - at[0]) / span * buckets).astype(np.int64), buckets - 1)
    order = np.lexsort((y[index], bucket))
    starts = np.flatnonzero(np.r_[True, np.diff(bucket[order]) > 0])
    ends = np.r_[starts[1:], len(order)] - 1
    kept = np.r_[0, order[starts], order[ends], len(index) - 1]
    return index[np.unique(kept)]


def smooth(y: Floats, window: int) -> Floats:
    """The mean over a centred window of `window` points (made odd); at the ends the window is cut, not shifted.

    Points that are not finite count for nothing; where the window holds no other, the result is not a number.
    """
    half = min(max(0, window // 2), len(y))
    if half == 0:
        return np.where(np.isfinite(y), y, np.nan)
    usable = np.isfinite(y)
    total = _window_sums(np.where(usable, y, 0.0), half)
    count = np.rint(_window_sums(usable.astype(np.float64), half))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _window_sums(y: Floats, half: int) -> Floats:
    """The sum of up to `half` values before each, itself, and as many after it.

    From sums over 1, 2, 4, ... values: a convolution takes as many additions as a window has values, which is minutes
    for a million steps, and differences of a running sum let one loss of 1e20 wipe out every digit after it.
    """
    sums, size = np.pad(y, half), 1
    total, begun, width = np.zeros(len(y)), 0, 2 * half + 1
    while size <= width:
        if width & size:
            total += sums[begun : begun + len(y)]
            begun += size
        sums = sums[:-size] + sums[size:]
        size *= 2
    return total


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near `wanted`, at least `gap` apart, within `[low, high]`: where labels go so that none overlap.

    Order is kept; the squared distance moved is least (blocks that would overlap are pooled, as in isotonic
    regression). When the labels do not fit, they are set evenly over the whole range.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    if gap * (len(wanted) - 1) > high - low:
        placed = list(np.linspace(low, high, len(wanted)))
    else:
        # Without their gaps the labels need only be in order: pool neighbours that are not.
        blocks: list[tuple[float, int]] = []
        for rank, i in enumerate(order):
            mean, size = wanted[i] - rank * gap, 1
            while blocks and blocks[-1][0] > mean:
                other, count = blocks.pop()
                mean, size = (mean * size + other * count) / (size + count), size + count
            blocks.append((mean, size))
        flat = [mean for mean, size in blocks for _ in range(size)]
        top = high - gap * (len(wanted) - 1)
        placed = [min(max(value, low), top) + rank * gap for rank, value in enumerate(flat)]
    positions = [0.0] * len(wanted)
    for i, position in zip(order, placed):
        positions[i] = float(position)
    return positions
