"""How facts are acquired and forgotten, from log-probabilities of what was asked at checkpoints.

As in Chang et al. (arXiv 2406.11813): from the highest point after training on a fact, what is left of the rise is
its retainability, which falls with the logarithm of the tokens since; its slope is the decay constant, and where the
line meets zero, nothing is left. There a point is a step within fifty of an injection; here it is a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

OUTLIER = 1.5  # interquartile ranges beyond the quartiles


@dataclass(frozen=True)
class Memory:
    """What became of some facts.

    Attributes:
        before: Mean log-probability at the first checkpoint, nats.
        peak: At the checkpoint where it is highest.
        peak_tokens: Where that is.
        last: At the last checkpoint.
        retained: Share of the rise that is left at the last checkpoint; NaN where the peak is the last.
        decay: Share of the rise that is lost with every tenfold of tokens since the peak; NaN for fewer than two
            checkpoints after it.
        threshold: Tokens after the peak at which nothing is left, by that line; infinite where nothing is lost.
    """

    before: float
    peak: float
    peak_tokens: float
    last: float
    retained: float
    decay: float
    threshold: float

    @property
    def effectivity(self) -> float:
        """How much was acquired, nats."""
        return self.peak - self.before


def memory(tokens: ArrayLike, values: ArrayLike) -> Memory:
    """Follow some facts over checkpoints.

    Args:
        tokens: [n] rising.
        values: [n, facts] log-probability of each answer, nats.
    """
    x, y = np.asarray(tokens, np.float64), np.asarray(values, np.float64)
    means = y.mean(1)
    top = int(means.argmax())
    after = [retainability(y[0], y[top], y[place]) for place in range(top + 1, len(x))]
    decay, threshold = _decay(x[top + 1 :] - x[top], np.array(after))
    return Memory(
        before=float(means[0]),
        peak=float(means[top]),
        peak_tokens=float(x[top]),
        last=float(means[-1]),
        retained=after[-1] if after and top > 0 else float("nan"),
        decay=decay if top > 0 else float("nan"),
        threshold=threshold if top > 0 else float("nan"),
    )


def retainability(before: ArrayLike, peak: ArrayLike, now: ArrayLike) -> float:
    """Share of a rise that is left: the mean over facts of `(now - before) / (peak - before)`.

    Facts whose share lies 1.5 interquartile ranges beyond the quartiles are left out, as are those that did not rise:
    where there was hardly a rise the share is any number.

    Args:
        before: [facts] log-probability.
        peak: [facts], after training on them.
        now: [facts].

    Returns:
        NaN where no fact rose.
    """
    low, high, value = (np.asarray(x, np.float64) for x in (before, peak, now))
    rose = high > low
    if not rose.any():
        return float("nan")
    shares = (value[rose] - low[rose]) / (high[rose] - low[rose])
    first, third = np.percentile(shares, [25, 75])
    reach = OUTLIER * (third - first)
    return float(shares[(shares >= first - reach) & (shares <= third + reach)].mean())


def _decay(since: NDArray, shares: NDArray) -> tuple[float, float]:
    """Slope and zero of `share = c - a log10(tokens since)`, by least squares."""
    known = np.isfinite(shares)
    if known.sum() < 2:
        return float("nan"), float("nan")
    slope, level = np.polyfit(np.log10(since[known]), shares[known], 1)
    if slope >= 0:
        return float(-slope), float("inf")
    return float(-slope), float(10 ** min(level / -slope, 300.0))
