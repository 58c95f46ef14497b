"""The data order: global sample number `n` -> stage, source, epoch and window, computed and never stored."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.apportion import Apportionment, exact_weight
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.data.permutation import BLOCK, Permutation, permute, radices, round_keys
from megatron_davinci.errors import DataError


class Location(NamedTuple):
    """What one sample is.

    Attributes:
        stage: Name of the stage.
        source: Name of the source.
        epoch: How many times the source was passed through before.
        window: Number of the window in the source.
    """

    stage: str
    source: str
    epoch: int
    window: int


class Locations(NamedTuple):
    """What many samples are.

    Attributes:
        source: [n] int64, the source's place in `Curriculum.sources`.
        epoch: [n] int64.
        window: [n] int64.
    """

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


class _Segment(NamedTuple):
    """The samples that one record governs, from `first` on.

    `mixed` are the sources with weight, by rising place: the shares are theirs alone, so a source that a record does
    not mix, or that a run gains later, moves no sample of it. `base` is what each of all the sources gave before,
    and `debts` what it is owed then.
    """

    first: int
    stage: str
    base: list[int]
    debts: list[int]
    mixed: list[int]
    shares: Apportionment
    base_of_mixed: np.ndarray
    mixed_places: np.ndarray


class Curriculum:
    """The order in which a run sees its windows.

    Sample `n` lies in the segment of the last record with `first_sample <= n`. The segment's apportionment says
    which source takes it and as which of the source's samples, counted from the run's start: position `p`. Of a
    source with `W` windows, that is window `permutation(p mod W)` of epoch `p // W`, where the permutation is keyed
    by (seed, source, epoch). Every source thus passes through all its windows before it repeats one, whatever the
    records do.

    Args:
        windows: Number of windows by source, in any order: sources are taken by name.
        seed: Of the run.
        records: The journal's mixtures, by rising `first_sample`, from sample 0 on.

    Attributes:
        sources: The sources' names, sorted.
        seed: Of the run.

    Raises:
        DataError: A record names an unknown source or one without windows, or is out of order.
    """

    def __init__(self, windows: Mapping[str, int], seed: int, records: Sequence[MixRecord] = ()) -> None:
        self.sources = tuple(sorted(windows))
        self.seed = seed
        self._places = {source: place for place, source in enumerate(self.sources)}
        self._windows = [windows[source] for source in self.sources]
        # A source without windows may be there as long as no record gives it weight; nothing is located in it.
        sizes = [max(1, count) for count in self._windows]
        self._sizes = np.array(sizes, np.int64)
        self._radices = np.array([radices(size) for size in sizes], np.int64).reshape(-1, 2)
        self._segments: list[_Segment] = []
        self._firsts: list[int] = []
        for record in records:
            self.append(record)

    @property
    def windows(self) -> dict[str, int]:
        """Number of windows by source."""
        return dict(zip(self.sources, self._windows, strict=True))

    @property
    def first_samples(self) -> tuple[int, ...]:
        """The first sample of each record."""
        return tuple(self._firsts)

    def append(self, record: MixRecord) -> None:
        """Let a record govern the samples from its first on. No sample before it moves.

        Raises:
            DataError: The record names an unknown source or one without windows, or is out of order.
        """
        self.check_mixture(record)
        self._check_order(record)
        base, debts = [0] * len(self.sources), [0] * len(self.sources)
        if self._segments:
            last = self._segments[-1]
            length = record.first_sample - last.first
            base, debts = last.base.copy(), last.debts.copy()
            gave, owed = last.shares.counts(length), last.shares.debts_after(length)
            for place, more, debt in zip(last.mixed, gave.tolist(), owed, strict=True):
                base[place] += more
                debts[place] = debt
        weights = [record.weights.get(source, "0") for source in self.sources]
        mixed = [place for place, weight in enumerate(weights) if exact_weight(weight) > 0]
        shares = Apportionment([weights[place] for place in mixed], [debts[place] for place in mixed])
        arrays = np.array([base[place] for place in mixed], np.int64), np.array(mixed, np.int64)
        segment = _Segment(record.first_sample, record.stage, base, debts, mixed, shares, *arrays)
        # In this order a thread that reads ahead never finds a first sample without its segment.
        self._segments.append(segment)
        self._firsts.append(record.first_sample)

    def forget_from(self, sample: int) -> None:
        """Take back the records from `sample` on: what they would have governed was planned and not used.

        Whoever read ahead by them must have stopped.
        """
        while self._firsts and self._firsts[-1] >= sample:
            self._firsts.pop()
            self._segments.pop()

    def locate(self, n: int) -> Location:
        """What sample `n` is. The cost does not depend on `n`.

        Raises:
            DataError: No record governs the sample.
        """
        # NumPy's integers overflow where Python's do not, and numbers out of an array are NumPy's.
        n = operator.index(n)
        segment = self._segment(n)
        mixed, index = segment.shares.assign_one(n - segment.first)
        source = segment.mixed[mixed]
        epoch, position = divmod(segment.base[source] + index, self._windows[source])
        name = self.sources[source]
        window = _permutation(self._windows[source], self.seed, name, epoch)(position)
        return Location(segment.stage, name, epoch, window)

    def locate_many(self, ns: np.ndarray) -> Locations:
        """`locate` of each sample.

        Args:
            ns: [n] integers, in any order.

        Raises:
            DataError: No record governs a sample.
        """
        ns = np.asarray(ns, np.int64)
        located = Locations(*(np.empty(len(ns), np.int64) for _ in Locations._fields))
        if len(ns):
            self._segment(int(ns.min()))
        for first in range(0, len(ns), BLOCK):
            part = slice(first, first + BLOCK)
            self._locate_block(ns[part], *(column[part] for column in located))
        return located

    def find(self, source: str, epoch: int, window: int) -> int:
        """The sample that is a window of a source in an epoch: the inverse of `locate`.

        Costs O(log records + log sources), however far out the sample lies. A sample that a skip leaves out is
        found like any other; `Journal.after_skips` tells which those are.

        Args:
            source: Name of the source.
            epoch: From 0.
            window: Number of the window in the source.

        Raises:
            DataError: There is no such source, epoch or window, or the last record gives the source no weight and
                the mixtures before it do not come as far.
        """
        epoch, window = operator.index(epoch), operator.index(window)
        size = self._windows_of(source, epoch, window)
        place = self._places[source]
        position = epoch * size + _permutation(size, self.seed, source, epoch).inverse(window)
        segment = self._segments[bisect_right(self._segments, position, key=lambda s: s.base[place]) - 1]
        if place not in segment.mixed:
            # Every earlier segment whose base is as low was left behind, so this is the last one.
            raise DataError(
                "No sample is this window: the mixture has moved on.",
                where=f"window {window:,} of source {source} in epoch {epoch:,}",
                found=f"{segment.base[place]:,} samples of {source} before sample {segment.first:,}, none after",
                expected=f"{position + 1:,} samples of {source}",
                do="see `consumed` for how far each source comes",
            )
        index = position - segment.base[place]
        return segment.first + segment.shares.when(segment.mixed.index(place), index)

    def consumed(self, n: int) -> dict[str, int]:
        """How many of the samples 0 to `n - 1` each source gave.

        Raises:
            DataError: No record governs them.
        """
        n = operator.index(n)
        if n == 0:
            return dict.fromkeys(self.sources, 0)
        segment = self._segment(n - 1)
        total = segment.base.copy()
        for place, more in zip(segment.mixed, segment.shares.counts(n - segment.first).tolist(), strict=True):
            total[place] += more
        return dict(zip(self.sources, total, strict=True))

    def _segment(self, n: int) -> _Segment:
        if n < 0 or not self._firsts:
            raise DataError(
                "No record of the journal governs this sample.",
                found=f"sample {n:,}",
                expected="0 or more, after the first record" if not self._firsts else "0 or more",
            )
        return self._segments[bisect_right(self._firsts, n) - 1]

    def _windows_of(self, source: str, epoch: int, window: int) -> int:
        """How many windows a source has, once it is sure that this is one of them."""
        if source not in self._places:
            raise DataError(
                "The run has no such source.", found=source, expected="one of " + ", ".join(self.sources)
            )
        size = self._windows[self._places[source]]
        if epoch < 0 or not 0 <= window < size:
            raise DataError(
                f"Source {source} has no such window.",
                found=f"window {window:,} of epoch {epoch:,}",
                expected=f"window 0 to {size - 1:,} of epoch 0 or later"
                if size
                else "no window: it is empty",
            )
        if not self._segments:
            raise DataError(
                "No record of the journal governs any sample.", found="a journal without mixtures"
            )
        return size

    def _locate_block(
        self, ns: np.ndarray, source: np.ndarray, epoch: np.ndarray, window: np.ndarray
    ) -> None:
        position = np.empty_like(ns)
        for segment, here in self._by_segment(ns):
            mixed, index = segment.shares.assign(ns[here] - segment.first)
            source[here] = segment.mixed_places.take(mixed)
            position[here] = segment.base_of_mixed.take(mixed) + index
        size = self._sizes.take(source)
        np.floor_divide(position, size, out=epoch)
        position -= epoch * size
        # One key schedule for each pair of source and epoch that occurs.
        pairs, which = _distinct(epoch * len(self.sources) + source)
        keys = [
            round_keys(self.seed, self.sources[pair % len(self.sources)], pair // len(self.sources))
            for pair in pairs.tolist()
        ]
        of_pair = pairs % len(self.sources)
        a, b = self._radices[of_pair].T
        window[:] = permute(position, which, self._sizes[of_pair], a, b, np.array(keys, np.uint64).T.copy())

    def _by_segment(self, ns: np.ndarray) -> Iterator[tuple[_Segment, np.ndarray | slice]]:
        """The segments in which samples lie, and which samples those are."""
        number = np.searchsorted(np.array(self._firsts, np.int64), ns, side="right") - 1
        lowest, highest = int(number.min()), int(number.max())
        if lowest == highest:
            yield self._segments[lowest], slice(None)
            return
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(lowest, highest + 2))
        for at, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
            if begin < end:
                yield self._segments[lowest + at], order[begin:end]

    def check_mixture(self, record: MixRecord) -> None:
        """Refuse a mixture that cannot be drawn.

        Raises:
            DataError: It names an unknown source, or gives weight to one without windows.
        """
        where = _where(record)
        unknown = sorted(set(record.weights) - set(self.sources))
        if unknown:
            raise DataError(
                "A mixture names sources that the run does not have.",
                where=where,
                found=", ".join(unknown),
                expected="some of " + ", ".join(self.sources),
            )
        empty = [
            source
            for source, count in zip(self.sources, self._windows, strict=True)
            if count <= 0 and exact_weight(record.weights.get(source, "0")) > 0
        ]
        if empty:
            raise DataError(
                "A mixture takes from sources without a window.", where=where, found=", ".join(empty)
            )

    def _check_order(self, record: MixRecord) -> None:
        expected = f"after {self._firsts[-1]:,}" if self._firsts else "0"
        if record.first_sample <= self._firsts[-1] if self._firsts else record.first_sample != 0:
            raise DataError(
                "A record is out of order.",
                where=_where(record),
                found=f"{record.first_sample:,}",
                expected=expected,
            )


def _where(record: MixRecord) -> str:
    return f"the record from sample {record.first_sample:,} on (stage {record.stage})"


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur, and the place of each element's among them: `numpy.unique` where they are scattered."""
    lowest = int(values.min())
    span = int(values.max()) - lowest + 1
    if span > 4 * len(values):
        return np.unique(values, return_inverse=True)
    # Most blocks lie in few epochs: a table of what occurs needs no sorting.
    offsets = values - lowest
    occurs = np.zeros(span, bool)
    occurs[offsets] = True
    found = np.flatnonzero(occurs)
    place = np.empty(span, np.int64)
    place[found] = np.arange(len(found))
    return found + lowest, place.take(offsets)


@lru_cache(maxsize=1 << 12)
def _permutation(size: int, seed: int, source: str, epoch: int) -> Permutation:
    return Permutation(size, round_keys(seed, source, epoch))
