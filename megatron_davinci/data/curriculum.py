"""The data order: global sample number `n` -> stage, source, epoch and window, computed and never stored."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.apportion import Apportionment, exact_weight
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.data.permutation import Permutation, permute, radices, round_keys
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
    """The samples that one record governs, from `first` on; `base` is what each source gave before."""

    first: int
    stage: str
    base: list[int]
    bases: np.ndarray
    shares: Apportionment


class Curriculum:
    """The order in which a run sees its windows.

    Sample `n` lies in the segment of the last record with `first_sample <= n`. The segment's apportionment says
    which source takes it and as which of the source's samples, counted from the run's start: position `p`. Of a
    source with `W` windows, that is window `permutation(p mod W)` of epoch `p // W`, where the permutation is keyed
    by (seed, source, epoch). Every source thus passes through all its windows before it repeats one, whatever the
    records do.

    Args:
        windows: Number of windows by source. The order of the sources is part of the data order.
        seed: Of the run.
        records: The journal's mixtures, by rising `first_sample`, from sample 0 on.

    Raises:
        DataError: A record names an unknown source or one without windows, or is out of order.
    """

    def __init__(self, windows: Mapping[str, int], seed: int, records: Sequence[MixRecord] = ()) -> None:
        self.sources = tuple(windows)
        self.seed = seed
        self._windows = [windows[source] for source in self.sources]
        # A source without windows may be there as long as no record gives it weight; nothing is located in it.
        sizes = [max(1, count) for count in self._windows]
        self._sizes = np.array(sizes, np.int64)
        self._radices = np.array([radices(size) for size in sizes], np.uint64).reshape(-1, 2)
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
        self._check(record)
        base, debts = [0] * len(self.sources), [0] * len(self.sources)
        if self._segments:
            last = self._segments[-1]
            length = record.first_sample - last.first
            base = [had + int(more) for had, more in zip(last.base, last.shares.counts(length), strict=True)]
            debts = last.shares.debts_after(length)
        shares = Apportionment([record.weights.get(source, "0") for source in self.sources], debts)
        segment = _Segment(record.first_sample, record.stage, base, np.array(base, np.int64), shares)
        # In this order a thread that reads ahead never finds a first sample without its segment.
        self._segments.append(segment)
        self._firsts.append(record.first_sample)

    def locate(self, n: int) -> Location:
        """What sample `n` is. The cost does not depend on `n`.

        Raises:
            DataError: No record governs the sample.
        """
        segment = self._segment(n)
        source, index = segment.shares.assign_one(n - segment.first)
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
        if len(ns) == 0:
            empty = np.empty(0, np.int64)
            return Locations(empty, empty, empty)
        self._segment(int(ns.min()))
        which = np.searchsorted(np.array(self._firsts, np.int64), ns, side="right") - 1
        source, position = np.empty_like(ns), np.empty_like(ns)
        for number in np.unique(which):
            segment, here = self._segments[number], which == number
            source[here], index = segment.shares.assign(ns[here] - segment.first)
            position[here] = segment.bases[source[here]] + index
        size = self._sizes[source]
        epoch, within = np.divmod(position, size)
        a, b = self._radices[source].T
        window = permute(within, size.astype(np.uint64), a, b, self._keys(source, epoch))
        return Locations(source, epoch, window)

    def consumed(self, n: int) -> dict[str, int]:
        """How many of the samples 0 to `n - 1` each source gave.

        Raises:
            DataError: No record governs them.
        """
        if n == 0:
            return dict.fromkeys(self.sources, 0)
        segment = self._segment(n - 1)
        counts = segment.shares.counts(n - segment.first)
        return {
            source: had + int(more)
            for source, had, more in zip(self.sources, segment.base, counts, strict=True)
        }

    def _segment(self, n: int) -> _Segment:
        if n < 0 or not self._firsts:
            raise DataError(
                "No record of the journal governs this sample.",
                found=f"sample {n:,}",
                expected="0 or more, after the first record" if not self._firsts else "0 or more",
            )
        return self._segments[bisect_right(self._firsts, n) - 1]

    def _keys(self, source: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        # One key schedule for each pair that occurs, spread over the samples: [HALF_ROUNDS, n].
        pairs, which = np.unique(epoch * len(self.sources) + source, return_inverse=True)
        schedules = [
            round_keys(self.seed, self.sources[pair % len(self.sources)], pair // len(self.sources))
            for pair in pairs.tolist()
        ]
        return np.array(schedules, np.uint64).T[:, which]

    def _check(self, record: MixRecord) -> None:
        where = f"the record from sample {record.first_sample:,} on (stage {record.stage})"
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
        expected = f"after {self._firsts[-1]:,}" if self._firsts else "0"
        if record.first_sample <= self._firsts[-1] if self._firsts else record.first_sample != 0:
            raise DataError(
                "A record is out of order.", where=where, found=f"{record.first_sample:,}", expected=expected
            )


@lru_cache(maxsize=1 << 12)
def _permutation(size: int, seed: int, source: str, epoch: int) -> Permutation:
    return Permutation(size, round_keys(seed, source, epoch))
