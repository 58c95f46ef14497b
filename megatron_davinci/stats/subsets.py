"""The fewest items that rank models as all of them do, chosen on some models and verified on others.

An item discriminates where those models have it right that are good at all other items: its point-biserial
correlation with the score on the rest, as classical test theory has it and DatBench (arXiv 2601.02316) uses it for
benchmarks. Items chosen on the models that they are judged by would look good by chance alone, so they are chosen on
a random half of the models and judged on the other half, many times over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.stats.rankings import kendall_tau

LEAST_MODELS = 6
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
TARGET = 0.9
SPLITS = 60
_DEFINED = 0.9  # of splits, below which a mean would be of those that happen to tell models apart


@dataclass(frozen=True)
class DiscriminativeSubset:
    """A choice of items.

    Attributes:
        items: The chosen, by all models, the most discriminating first; all of them where no fewer will do.
        of: How many there are.
        tau: Of rankings by them and by all items, on models that they were not chosen on: the mean over splits.
        random: The same of as many items at random.
        curve: (items, tau, random) of each size that was looked at.
    """

    items: list[int]
    of: int
    tau: float
    random: float
    curve: list[tuple[int, float, float]]

    @property
    def found(self) -> bool:
        """Whether fewer items than all will do."""
        return len(self.items) < self.of


def discrimination(scores: ArrayLike) -> NDArray[np.float64]:
    """Point-biserial correlation of each item with the mean of all other items.

    Args:
        scores: [models, items].

    Returns:
        [items], 0 for an item that all models answer alike.
    """
    x = np.asarray(scores, np.float64)
    rest = x.sum(1, keepdims=True) - x
    a, b = x - x.mean(0), rest - rest.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros(x.shape[1]), where=size > 1e-12)


def discriminative_subset(
    scores: ArrayLike, *, target: float = TARGET, splits: int = SPLITS, seed: int = 0
) -> DiscriminativeSubset | None:
    """Find the fewest items that rank models as all do.

    The size is the smallest at which the mean tau over the first half of the splits reaches the target; what is
    reported of it comes from the second half.

    Args:
        scores: [models, items]; of one run's checkpoints the models are what it came through.
        target: Kendall's tau-b with the ranking by all items.
        splits: Of the models in two halves.
        seed: Of what is drawn.

    Returns:
        None for fewer than 6 models, or where models are not told apart by all items.
    """
    x = np.asarray(scores, np.float64)
    models, items = x.shape
    sizes = sorted({max(2, round(share * items)) for share in SHARES} - {items})
    sizes = [size for size in sizes if size < items]
    if models < LEAST_MODELS or not sizes:
        return None
    generator = np.random.default_rng(seed)
    chosen, random = np.empty((splits, len(sizes))), np.empty((splits, len(sizes)))
    for split in range(splits):
        order = generator.permutation(models)
        select, verify = x[order[: models // 2]], x[order[models // 2 :]]
        whole = verify.sum(1)
        ranked = _ranked(discrimination(select), generator)
        drawn = generator.permutation(items)
        for place, size in enumerate(sizes):
            chosen[split, place] = kendall_tau(verify[:, ranked[:size]].sum(1), whole)
            random[split, place] = kendall_tau(verify[:, drawn[:size]].sum(1), whole)
    if not np.isfinite(kendall_tau(x.sum(1), x.sum(1))):
        return None
    half = splits // 2
    curve = [
        (size, _mean(chosen[half:, place]), _mean(random[half:, place])) for place, size in enumerate(sizes)
    ]
    enough = [place for place in range(len(sizes)) if _mean(chosen[:half, place]) >= target]
    order = _ranked(discrimination(x), generator)
    if not enough:
        return DiscriminativeSubset(order.tolist(), items, 1.0, 1.0, curve)
    size, tau, by_chance = curve[enough[0]]
    return DiscriminativeSubset(order[:size].tolist(), items, tau, by_chance, curve)


def _ranked(values: NDArray, generator: np.random.Generator) -> NDArray:
    """Places of the highest values first; equals in a random order."""
    return np.lexsort((generator.random(len(values)), -values))


def _mean(taus: NDArray) -> float:
    known = taus[np.isfinite(taus)]
    return float(known.mean()) if len(known) >= _DEFINED * len(taus) else float("nan")
