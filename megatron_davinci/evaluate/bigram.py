"""The bigram that a trained model must beat: interpolated modified Kneser-Ney over token ids.

Sources: R. Kneser, H. Ney, "Improved backing-off for m-gram language modeling" (ICASSP 1995), for lower-order
counts that ask in how many contexts a token was seen; S. F. Chen, J. Goodman, "An empirical study of smoothing
techniques for language modeling" (Harvard TR-10-98, 1998), section 3, for interpolation, for three discounts
instead of one ("modified"), which they found to be the best of the family, and for the discounts' estimates.

    p(w | v)  = max(c(vw) - D(c(vw)), 0) / c(v) + gamma(v) p(w)
    gamma(v)  = (D1 N1(v) + D2 N2(v) + D3 N3+(v)) / c(v),  1 for a context that was never seen
    p(w)      = max(k(w) - D'(k(w)), 0) / K + gamma' / V,  k(w): contexts that w follows, K: their sum
    D1 = 1 - 2 Y n2/n1,  D2 = 2 - 3 Y n3/n2,  D3 = 3 - 4 Y n4/n3,  Y = n1 / (n1 + 2 n2)

`c` counts bigrams, `N1(v)` the tokens that follow `v` once, `n1` the bigrams seen once (for `D'`: the tokens
with k = 1); `V` is the vocabulary's size. The discounts of the lower order come from its own counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Keys that wait to be counted; 32 MB, whatever the number of windows.
PENDING_KEYS = 4_000_000


@dataclass(frozen=True, slots=True)
class BigramKneserNey:
    """A bigram language model over token ids; every token has a positive probability in every context.

    Attributes:
        vocab_size: `V`; ids are in `[0, V)`.
        bigrams: int64 `[B]`, `v * V + w` of each bigram that was seen, ascending.
        discounted: float64 `[B]`, `max(c(vw) - D, 0) / c(v)` of each.
        backoff: float64 `[V]`, `gamma(v)`.
        unigram: float64 `[V]`, `p(w)`.
        discounts: `(D1, D2, D3)` of the bigrams.
        tokens: How many labels were counted.
    """

    vocab_size: int
    bigrams: Integers
    discounted: Floats
    backoff: Floats
    unigram: Floats
    discounts: tuple[float, float, float]
    tokens: int

    @classmethod
    def fit(cls, windows: Iterable[NDArray[np.integer]], vocab_size: int) -> BigramKneserNey:
        """Counts the bigrams inside each window and estimates the model; nothing is counted across windows.

        Args:
            windows: Integer arrays `[S + 1]` (any lengths from 2). Memory is that of the distinct bigrams.
            vocab_size: The number of token ids.

        Raises:
            DataError: No bigram at all, or a window that is not one row of ids in `[0, vocab_size)`.
        """
        bigrams, counts = _count(windows, vocab_size)
        previous, following = np.divmod(bigrams, vocab_size)

        discounts = estimate_discounts(counts)
        taken = _discount(counts, discounts)
        context = np.bincount(previous, weights=counts, minlength=vocab_size)
        freed = np.bincount(previous, weights=taken, minlength=vocab_size)
        seen = context > 0
        backoff = np.ones(vocab_size)
        backoff[seen] = freed[seen] / context[seen]

        contexts_of = np.bincount(following, minlength=vocab_size).astype(np.int64)
        lower_taken = _discount(contexts_of, estimate_discounts(contexts_of))
        unigram = (contexts_of - lower_taken + lower_taken.sum() / vocab_size) / len(bigrams)

        discounted = (counts - taken) / context[previous]
        return cls(vocab_size, bigrams, discounted, backoff, unigram, discounts, int(counts.sum()))

    def prob(self, previous: NDArray[np.integer], following: NDArray[np.integer]) -> Floats:
        """`p(following | previous)`, float64; the two integer arrays are broadcast against each other."""
        v, w = np.broadcast_arrays(np.asarray(previous, np.int64), np.asarray(following, np.int64))
        key = v * self.vocab_size + w
        place = np.minimum(np.searchsorted(self.bigrams, key), len(self.bigrams) - 1)
        own = np.where(self.bigrams[place] == key, self.discounted[place], 0.0)
        probability: Floats = own + self.backoff[v] * self.unigram[w]
        return probability

    def log_prob(self, previous: NDArray[np.integer], following: NDArray[np.integer]) -> Floats:
        """`ln p(following | previous)` in nats, float64; the two integer arrays are broadcast."""
        log: Floats = np.log(self.prob(previous, following))
        return log

    def loss(self, windows: Iterable[NDArray[np.integer]]) -> float:
        """Mean negative log-likelihood in nats per label over all windows (`[S + 1]` ids, `S` labels each).

        Raises:
            DataError: No label at all, or a window that is not one row of ids in `[0, vocab_size)`.
        """
        total = 0.0
        labels = 0
        for number, window in enumerate(windows):
            ids = _checked(window, self.vocab_size, number)
            total -= float(self.log_prob(ids[:-1], ids[1:]).sum())
            labels += len(ids) - 1
        if labels == 0:
            raise DataError("There is nothing to score.", found="no windows", expected="at least one window")
        return total / labels


def estimate_discounts(counts: NDArray[np.integer]) -> tuple[float, float, float]:
    """`(D1, D2, D3)` for counts 1, 2 and 3 or more, from the counts of counts (Chen & Goodman 1998, eq. 26).

    Where those give no usable value (too little data: a count of counts is zero, or a discount is not
    positive), the one discount `Y = n1 / (n1 + 2 n2)` of Kneser & Ney stands for all three, and 0.5 where that
    is 0 or 1: a discount of 0 would leave nothing for what was not seen.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
    single = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if min(n1, n2, n3, n4) == 0:
        return (single, single, single)
    modified = (single, 2 - 3 * single * n3 / n2, 3 - 4 * single * n4 / n3)
    return modified if min(modified) > 0 else (single, single, single)


def _discount(counts: NDArray[np.integer], discounts: tuple[float, float, float]) -> Floats:
    taken: Floats = np.array((0.0, *discounts))[np.minimum(counts, 3)]
    return taken


def _count(windows: Iterable[NDArray[np.integer]], vocab_size: int) -> tuple[Integers, Integers]:
    """The distinct bigrams as ascending keys `v * V + w`, and how often each was seen."""
    keys = np.empty(0, np.int64)
    counts = np.empty(0, np.int64)
    pending: list[Integers] = []
    waiting = 0

    def merge() -> None:
        nonlocal keys, counts, waiting
        fresh, times = np.unique(np.concatenate(pending), return_counts=True)
        keys, place = np.unique(np.concatenate([keys, fresh]), return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate([counts, times])).astype(np.int64)
        pending.clear()
        waiting = 0

    for number, window in enumerate(windows):
        ids = _checked(window, vocab_size, number)
        pending.append(ids[:-1] * vocab_size + ids[1:])
        waiting += len(ids) - 1
        if waiting >= PENDING_KEYS:
            merge()
    if pending:
        merge()
    if not len(keys):
        raise DataError("There is nothing to count.", found="no windows", expected="at least one window")
    return keys, counts


def _checked(window: NDArray[np.integer], vocab_size: int, number: int) -> Integers:
    ids = np.asarray(window)
    where = f"window {number}"
    if ids.ndim != 1 or len(ids) < 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            "A window is not one row of token ids.",
            where=where,
            found=f"{ids.dtype} {list(ids.shape)}",
            expected="integers [S + 1] with S at least 1",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            "A token id is outside the vocabulary.",
            where=where,
            found=low if low < 0 else high,
            expected=f"ids in [0, {vocab_size})",
            do="use the tokenizer that the data was made with",
        )
    return ids.astype(np.int64)
