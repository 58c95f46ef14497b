"""Whether two ways of measuring rank models alike, and which pairs of models they rank in opposite order.

Models (or checkpoints of one) are scored on the same items in both ways. Agreement is Kendall's tau-b (1945), with an
interval over items; each way's agreement with itself, between halves of the items, says how much could be expected.
A pair is reversed where both ways find a difference and the two are opposite (daVinci-LLM, arXiv 2603.27164, section
4.4: the order of two models by likelihood is not that by generation). Differences are of pairs of items (Miller,
arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.stats.comparison import holm

RESAMPLES = 2000
HALVES = 60
_DEFINED = 0.9  # of resamples, below which an interval would be of those that happen to tell models apart
_AT_ONCE = 2**22  # numbers of one block of resamples, of its items and of its pairs of models


@dataclass(frozen=True)
class RankedPair:
    """Two models in two ways. Differences are the second's mean less the first's.

    Attributes:
        first: A model.
        second: Another.
        one: Difference by the first way.
        other: Difference by the second way.
        swing: `other - one`.
        low: Lower end of the swing's interval, by pairs of items.
        high: Upper end.
        p: Of no reversal: the larger of the two differences' two-sided p-values, where they are opposite, by Holm's
            step-down over all pairs; 1 where they are not.
        level: What `p` must be below.
    """

    first: str
    second: str
    one: float
    other: float
    swing: float
    low: float
    high: float
    p: float
    level: float = 0.05

    @property
    def flips(self) -> bool:
        """Whether the two ways put them in opposite order, by noise or not."""
        return self.one * self.other < 0

    @property
    def reversed(self) -> bool:
        """Whether they do so beyond the noise of items."""
        return self.flips and self.p < self.level


@dataclass(frozen=True)
class Agreement:
    """Rankings of the same models in two ways.

    Attributes:
        models: Their names.
        one: Means by the first way.
        other: Means by the second way.
        items: How many both asked.
        tau: Kendall's tau-b of the means; NaN where one way has all models alike.
        low: Lower end of its interval, by percentiles of resampled items; NaN where more than a tenth of the
            resamples have all models alike.
        high: Upper end.
        own: Each way's tau with itself, between random halves of the items: the mean over splits, NaN likewise.
        pairs: All pairs of models, in their order.
    """

    models: list[str]
    one: list[float]
    other: list[float]
    items: int
    tau: float
    low: float
    high: float
    own: tuple[float, float]
    pairs: list[RankedPair]


def kendall_tau(one: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Kendall's tau-b, which counts ties in neither ranking as agreement.

    Args:
        one: [..., models].
        other: [..., models].

    Returns:
        [...]; NaN where all of one ranking's models are tied.
    """
    a, b = (_signs(np.asarray(x, np.float64)) for x in (one, other))
    both = (a * b).sum(-1)
    strict = np.sqrt((a != 0).sum(-1) * (b != 0).sum(-1).astype(np.float64))
    return np.divide(both, strict, out=np.full(np.shape(both), np.nan), where=strict > 0)


def compare_rankings(
    models: Sequence[str],
    one: ArrayLike,
    other: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare how two ways rank models.

    Args:
        models: Names, at least two.
        one: [models, items] scores by the first way.
        other: [models, items] scores of the same items by the second way.
        resamples: Of items, with replacement, the same for both ways and all models.
        confidence: Of the intervals; 1 less it is the level of reversals.
        seed: Of what is drawn.

    Raises:
        ValueError: The shapes do not fit, there are fewer than two models or items, or a score is not finite.
    """
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if x.shape != y.shape or x.ndim != 2 or len(x) != len(models) or min(x.shape) < 2:
        raise ValueError(f"two models and two items at least, scored in both ways: {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a score is not a number")
    generator = np.random.default_rng(seed)
    found = _resampled(x, y, resamples, generator)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(_known(found), [tail, 100 - tail])
    return Agreement(
        models=list(models),
        one=x.mean(1).tolist(),
        other=y.mean(1).tolist(),
        items=x.shape[1],
        tau=float(kendall_tau(x.sum(1), y.sum(1))),
        low=float(low),
        high=float(high),
        own=(_halves(x, generator), _halves(y, generator)),
        pairs=_pairs(models, x, y, confidence),
    )


def _signs(values: NDArray) -> NDArray:
    """[..., models] -> [..., pairs]: -1, 0, 1."""
    first, second = np.triu_indices(values.shape[-1], 1)
    return np.sign(values[..., second] - values[..., first])


def _resampled(x: NDArray, y: NDArray, resamples: int, generator: np.random.Generator) -> NDArray:
    models, items = x.shape
    block = max(1, _AT_ONCE // max(items, models * (models - 1) // 2))
    found = []
    for first in range(0, resamples, block):
        counts = generator.multinomial(items, np.full(items, 1 / items), min(block, resamples - first))
        # Sums, not means: ties of whole scores stay ties.
        found.append(kendall_tau(counts @ x.T, counts @ y.T))
    return np.concatenate(found)


def _halves(x: NDArray, generator: np.random.Generator) -> float:
    items = x.shape[1]
    found = []
    for _ in range(HALVES):
        order = generator.permutation(items)
        half = items // 2
        found.append(kendall_tau(x[:, order[:half]].sum(1), x[:, order[half : 2 * half]].sum(1)))
    return float(_known(np.array(found)).mean())


def _known(values: NDArray) -> NDArray:
    """Those that are numbers; NaN alone where too many are not."""
    known = values[np.isfinite(values)]
    return known if len(known) >= _DEFINED * len(values) else np.array([np.nan])


def _pairs(models: Sequence[str], x: NDArray, y: NDArray, confidence: float) -> list[RankedPair]:
    from scipy.stats import t

    bound = float(t.ppf((1 + confidence) / 2, x.shape[1] - 1))
    rows, p_values = [], []
    for a, b in combinations(range(len(models)), 2):
        (one, p_one, _), (other, p_other, _) = _paired(x[b] - x[a]), _paired(y[b] - y[a])
        swing, _, error = _paired((y[b] - y[a]) - (x[b] - x[a]))
        rows.append((models[a], models[b], one, other, swing, swing - bound * error, swing + bound * error))
        p_values.append(max(p_one, p_other) if one * other < 0 else 1.0)
    return [RankedPair(*row, p=p, level=1 - confidence) for row, p in zip(rows, holm(p_values), strict=True)]


def _paired(apart: NDArray) -> tuple[float, float, float]:
    """Mean, two-sided p-value of no difference, and standard error."""
    from scipy.stats import t

    mean, error = float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart)))
    if error == 0:
        return mean, 0.0 if mean else 1.0, 0.0
    return mean, float(2 * t.sf(abs(mean) / error, len(apart) - 1)), error
