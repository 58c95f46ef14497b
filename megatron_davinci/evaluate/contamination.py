"""Has the model seen a text? Scores of its tokens, and its n-grams in the training data.

Each score is higher for a text that is more likely to have been seen. They are to be read against texts of the same
kind that were certainly not seen: what separates other kinds of text is not memory.

- **Min-K%** (Shi et al., arXiv 2310.16789): the mean of the lowest k% of a text's token log-probabilities.
- **Min-K%++** (Zhang et al., arXiv 2404.02936): the same of `(log p(x) - mu) / sigma`, with mean and standard
  deviation of `log p` under the model's own distribution at that place.
- **DC-PDD** (Zhang et al., arXiv 2409.14781): the mean, over tokens at their first occurrence in the text, of
  `min(p(x) * log(1 / f(x)), a)`, with `f(x) = (count + 1) / (total + V)` from a reference corpus and `a = 0.01`.

How well a score separates seen from unseen texts is its AUROC, and its true positives at 5% false ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.errors import DataError

Floats = NDArray[np.float64]

SHARE = 0.2  # the k of Min-K%
CEILING = 0.01  # the a of DC-PDD


@dataclass(frozen=True)
class Scores:
    """Of one text; higher where it is more likely to have been seen.

    Attributes:
        min_k: Min-K%.
        min_k_plus: Min-K%++.
        dc_pdd: DC-PDD; NaN without a reference corpus.
        loss: Mean negative log-probability, nats a token; lower where it was seen.
    """

    min_k: float
    min_k_plus: float
    dc_pdd: float
    loss: float

    def record(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


class Frequencies:
    """How often each token is in a reference corpus.

    Args:
        counts: [V] of each token.
    """

    def __init__(self, counts: ArrayLike) -> None:
        self._counts = np.asarray(counts, np.float64)
        self._total = float(self._counts.sum())

    @classmethod
    def of(cls, windows: Iterable[NDArray[np.integer]], vocab_size: int) -> Frequencies:
        """Count the tokens of windows."""
        counts = np.zeros(vocab_size, np.int64)
        for window in windows:
            counts += np.bincount(np.asarray(window, np.int64), minlength=vocab_size)
        return cls(counts)

    def of_tokens(self, tokens: NDArray[np.integer]) -> Floats:
        """`(count + 1) / (total + V)` of each."""
        smoothed: Floats = (self._counts[np.asarray(tokens, np.int64)] + 1) / (
            self._total + len(self._counts)
        )
        return smoothed


def scores_of(
    tokens: Sequence[int], moments: Floats, reference: Frequencies | None = None, *, share: float = SHARE
) -> Scores:
    """All scores of a text.

    Args:
        tokens: [length] ids.
        moments: [length - 1, 3], as `Engine.token_scores` gives them: log-probability of each token but the first,
            and mean and standard deviation of the log-probability there.
        reference: Token frequencies for DC-PDD.
        share: The k of Min-K%, in (0, 1].

    Raises:
        DataError: A log-probability is not a number.
    """
    if len(tokens) < 2 or not np.isfinite(moments[:, 0]).all():
        raise DataError(
            "A text cannot be scored.",
            found="fewer than two tokens" if len(tokens) < 2 else "log-probabilities that are not numbers",
            do="leave it out" if len(tokens) < 2 else "look at the checkpoint: its weights are damaged",
        )
    log, mean, spread = moments.T
    return Scores(
        min_k=min_k(log, share),
        min_k_plus=min_k((log - mean) / np.maximum(spread, 1e-12), share),
        dc_pdd=dc_pdd(tokens, log, reference) if reference is not None else float("nan"),
        loss=float(-log.mean()),
    )


def min_k(values: ArrayLike, share: float = SHARE) -> float:
    """The mean of the lowest `share` of values, of one at least."""
    ordered = np.sort(np.asarray(values, np.float64))
    return float(ordered[: max(1, int(len(ordered) * share))].mean())


def dc_pdd(
    tokens: Sequence[int], log: ArrayLike, reference: Frequencies, *, ceiling: float = CEILING
) -> float:
    """DC-PDD of a text.

    Args:
        tokens: [length] ids.
        log: [length - 1] log-probability of each token but the first.
        reference: Token frequencies.
        ceiling: What a token can add at most.
    """
    predicted = np.asarray(tokens[1:], np.int64)
    first = np.sort(np.unique(predicted, return_index=True)[1])
    p = np.exp(np.asarray(log, np.float64)[first])
    parts = np.minimum(p * -np.log(reference.of_tokens(predicted[first])), ceiling)
    return float(parts.mean())


def auroc(seen: ArrayLike, unseen: ArrayLike) -> float:
    """The chance that a seen text has the higher score; ties count half (Mann and Whitney)."""
    high, low = np.asarray(seen, np.float64), np.sort(np.asarray(unseen, np.float64))
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / 2 / len(high) / len(low))


def true_positives(seen: ArrayLike, unseen: ArrayLike, false_positives: float = 0.05) -> float:
    """The share of seen texts above the score that `false_positives` of the unseen ones exceed."""
    bar = np.quantile(np.asarray(unseen, np.float64), 1 - false_positives, method="higher")
    return float((np.asarray(seen, np.float64) > bar).mean())
