"""Which source takes which sample, in exact shares and without counting.

The sources are the leaves of a balanced binary tree. Of the first `m` samples that arrive at a node, its left child
has had

    L(m) = floor((m * num + phase) / den),        num / den = the left child's share of the node, 0 <= phase < den

and its right child `m - L(m)`. Since `num <= den`, `L` grows by 0 or 1 with each sample: every sample goes to
exactly one source, and no count ever decreases. (Differences of floors of cumulative shares, the obvious closed
form, do decrease.) A count at sample `m` takes O(sources) divisions, the source of one sample O(log sources).

`phase` decides where in its period a node begins. A segment of the data order begins with debts: what each source
is owed (exact share so far less samples so far). With `D` a node's debt, the sum over its leaves, and `E = D_left -
(num/den) * D_node` the part of the left child's that is not its parent's, the course of the segment is
`E(m) = E + m * num/den - L(m)`, which stays in `E + [-phase/den, 1 - phase/den)`. So `phase/den = 1/2 + E`, kept
inside [0, 1), centres it on zero, and errors do not add up over many segments.

Only what a segment can repay counts as a debt in it: at most `REACH` samples, times the source's weight over the
largest. The debt of a source that has no weight now would only hide the opposite one of its neighbour in their sum,
and mixtures that take turns would drift apart without bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from megatron_davinci.errors import DataError

MAX_DENOMINATOR = 1 << 31
DEBT_BITS = 40
"""Debts are whole numbers of 2^-40 samples: exact enough for 10^9 records, and of one size however many there are."""

REACH = 16
"""Samples that a segment tries to make up for a source of the largest weight."""

_SMALL = 1 << 31  # below, m * num fits an int64 without splitting m
_EXACT = 1 << 53  # below, float64 holds every whole number, and the floor of a quotient of two is exact


def exact_weight(value: str | float | Fraction) -> Fraction:
    """A weight as a fraction: text and floats by their decimal digits, so that 0.1 is one tenth.

    Raises:
        DataError: It is no finite number, or negative.
    """
    try:
        weight = Fraction(repr(value) if isinstance(value, float) else value)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise DataError("A mixture weight is not a number.", found=repr(value)) from error
    if weight < 0:
        raise DataError("A mixture weight is negative.", found=value, expected="0 or more")
    return weight


def integer_weights(weights: Iterable[Fraction]) -> list[int]:
    """Whole numbers in proportion to the weights, with a sum of at most 2^31.

    Exact where the common denominator allows it; otherwise the nearest by largest remainder, where a positive
    weight stays positive.

    Raises:
        DataError: All weights are zero.
    """
    exact = list(weights)
    total = sum(exact, Fraction(0))
    if total == 0:
        raise DataError(
            "All mixture weights are zero.", found=f"{len(exact)} weights", expected="one above 0"
        )
    shares = [weight / total for weight in exact]
    denominator = 1
    for share in shares:
        denominator = math.lcm(denominator, share.denominator)
        if denominator > MAX_DENOMINATOR:
            return _largest_remainder(shares)
    return [share.numerator * (denominator // share.denominator) for share in shares]


class Apportionment:
    """The division of one segment's samples among the sources.

    Args:
        weights: One for each source, in the sources' order; text, floats or fractions in any common unit.
        debts: What each source is owed at the segment's start, in 2^-40 samples. Default: nothing.

    Raises:
        DataError: A weight is no number or negative, or all are zero.
    """

    def __init__(self, weights: Sequence[str | float | Fraction], debts: Sequence[int] | None = None) -> None:
        self._weights = integer_weights(exact_weight(weight) for weight in weights)
        self._debts = [0] * len(weights) if debts is None else list(debts)
        self._sources = len(weights)
        self._levels = (self._sources - 1).bit_length()
        # A heap: node k has children 2k and 2k + 1, the leaves begin at `first`. Weightless leaves fill it up.
        first = 1 << self._levels
        filler = [0] * (first - self._sources)
        total = [0] * first + self._weights + filler
        owed = [0] * first + self._payable() + filler
        self._num, self._den, self._phase = [0] * first, [1] * first, [0] * first
        for node in range(first - 1, 0, -1):
            total[node] = total[2 * node] + total[2 * node + 1]
            owed[node] = owed[2 * node] + owed[2 * node + 1]
            if total[node]:
                self._num[node], self._den[node], self._phase[node] = _divide(
                    total[2 * node], total[node], owed[2 * node], owed[node]
                )
        self._integers = tuple(np.array(part, np.int64) for part in (self._num, self._den, self._phase))
        self._floats = tuple(part.astype(np.float64) for part in self._integers)
        self._largest_den = max(self._den)

    def counts(self, m: int) -> np.ndarray:
        """How many of the segment's first `m` samples each source takes: [sources] int64, with sum `m`."""
        return np.array(self._counts(m), np.int64)

    def assign_one(self, m: int) -> tuple[int, int]:
        """Who takes sample `m` (from 0) of the segment.

        Returns:
            The source, and how many samples of the segment it took before.
        """
        node = 1
        for _ in range(self._levels):
            num = self._num[node]
            left, rest = divmod(m * num + self._phase[node], self._den[node])
            node *= 2
            if rest + num >= self._den[node >> 1]:
                m = left
            else:
                m -= left
                node += 1
        return node - (1 << self._levels), m

    def assign(self, ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`assign_one` of each sample.

        Args:
            ms: [n] int64, sample numbers in the segment.

        Returns:
            Sources and their indices, both [n] int64.
        """
        ms = np.asarray(ms, np.int64)
        largest = int(ms.max()) if len(ms) else 0
        # m * num + phase is below (m + 1) * den. Where that is exact as float64, division is several times faster:
        # a quotient x / den under a whole number q is at least 1 / den under it, more than rounding can lift it.
        floats = (largest + 1) * self._largest_den < _EXACT
        index = ms.astype(np.float64 if floats else np.int64)
        node = np.ones(len(ms), np.int64)
        for _ in range(self._levels):
            num, den, phase = (part.take(node) for part in (self._floats if floats else self._integers))
            if floats:
                total = index * num
                total += phase
                left = np.floor(total / den)
                rest = total - left * den
            elif largest < _SMALL:
                left, rest = np.divmod(index * num + phase, den)
            else:
                # m = whole * den + part, so that no product passes 2^62.
                whole, part = np.divmod(index, den)
                left, rest = np.divmod(part * num + phase, den)
                left += whole * num
            rest += num
            goes_right = rest < den
            index = np.where(goes_right, index - left, left)
            node += node
            node += goes_right
        return node - (1 << self._levels), index.astype(np.int64, copy=False)

    def when(self, source: int, index: int) -> int:
        """The sample of the segment that is sample number `index` of a source with weight.

        The inverse of `assign_one`, and as cheap: from the leaf up, sample `j` of a node's left child is the node's
        first `m` with `L(m + 1) = j + 1`, and likewise of its right child with `m + 1 - L(m + 1)`.
        """
        node = source + (1 << self._levels)
        while node > 1:
            is_right, node = node & 1, node >> 1
            num, den, phase = self._num[node], self._den[node], self._phase[node]
            if is_right:
                # The least m with (m + 1) * (den - num) >= index * den + phase + 1.
                index = (index * den + phase) // (den - num)
            else:
                # The least m with (m + 1) * num >= (index + 1) * den - phase.
                index = ((index + 1) * den - phase - 1) // num
        return index

    def debts_after(self, m: int) -> list[int]:
        """What each source is owed after `m` samples of the segment, in 2^-40 samples."""
        whole = sum(self._weights)
        return [
            debt + ((m * weight << DEBT_BITS) // whole) - (count << DEBT_BITS)
            for debt, weight, count in zip(self._debts, self._weights, self._counts(m), strict=True)
        ]

    def _payable(self) -> list[int]:
        largest = max(self._weights)
        reach = [(REACH * weight << DEBT_BITS) // largest for weight in self._weights]
        return [max(-most, min(most, debt)) for most, debt in zip(reach, self._debts, strict=True)]

    def _counts(self, m: int) -> list[int]:
        arrived = [0, m] + [0] * (2 * len(self._num) - 2)
        for node in range(1, len(self._num)):
            left = (arrived[node] * self._num[node] + self._phase[node]) // self._den[node]
            arrived[2 * node], arrived[2 * node + 1] = left, arrived[node] - left
        return arrived[len(self._num) :][: self._sources]


def _divide(left: int, whole: int, left_debt: int, debt: int) -> tuple[int, int, int]:
    common = math.gcd(left, whole)
    num, den = left // common, whole // common
    # (1/2 + D_left - num/den * D_node) * den, rounded down to a whole number.
    centred = ((den << DEBT_BITS - 1) + left_debt * den - debt * num) >> DEBT_BITS
    return num, den, max(0, min(den - 1, centred))


def _largest_remainder(shares: list[Fraction]) -> list[int]:
    scaled = [share * MAX_DENOMINATOR for share in shares]
    whole = [max(int(value), 1 if value else 0) for value in scaled]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - scaled[i], i))
    missing = MAX_DENOMINATOR - sum(whole)
    for i in order[: max(0, missing)]:
        whole[i] += 1
    if missing < 0:
        # Weights lifted to 1 took more than there was; the largest gives it.
        whole[max(range(len(whole)), key=whole.__getitem__)] += missing
    return whole
