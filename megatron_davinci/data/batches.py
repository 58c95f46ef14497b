"""Samples by number as arrays of tokens, read at once or ahead of their use."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError


class Batch(NamedTuple):
    """Samples, read.

    Attributes:
        tokens: [n, sequence_length + 1] of `Batches.dtype`; inputs are all but the last column, labels all but the
            first.
        source: [n] int32, each sample's source by its place in `Curriculum.sources`.
        loss_mask: [n, sequence_length] uint8, 1 where a label carries loss; None where all do.
    """

    tokens: np.ndarray
    source: np.ndarray
    loss_mask: np.ndarray | None = None


class Batches:
    """Reads samples by their global number. What a number gives depends on nothing else.

    Args:
        curriculum: Says what each sample is.
        sources: The curriculum's sources, open.

    Attributes:
        dtype: Of the tokens that are read: the narrowest of uint16, int32 and int64 that holds every source's.
        has_mask: A source says which tokens carry loss, so every batch has a mask.

    Raises:
        DataError: The sources are not the curriculum's, or are not of one sequence length.
    """

    def __init__(self, curriculum: Curriculum, sources: Mapping[str, Source]) -> None:
        found = {name: source.num_windows for name, source in sources.items()}
        if found != curriculum.windows:
            raise DataError(
                "The sources are not those of the curriculum.",
                found=", ".join(f"{name} with {count:,} windows" for name, count in found.items()),
                expected=", ".join(f"{name} with {count:,}" for name, count in curriculum.windows.items()),
            )
        lengths = {source.sequence_length for source in sources.values()}
        if len(lengths) != 1:
            raise DataError("The sources are cut to several sequence lengths.", found=sorted(lengths))
        self.curriculum = curriculum
        self.sequence_length = lengths.pop()
        self._sources = [sources[name] for name in curriculum.sources]
        self.has_mask = any(source.has_mask for source in self._sources)
        self.dtype = _common_dtype([source.dtype for source in self._sources])

    def read(self, ns: np.ndarray) -> Batch:
        """Read samples.

        Args:
            ns: [n] integers, in any order.

        Raises:
            DataError: A sample is governed by no record, or its window is damaged or outside the vocabulary.
            EnvironmentProblem: A shard cannot be read.
        """
        located = self.curriculum.locate_many(ns)
        tokens = np.empty((len(located.source), self.sequence_length + 1), self.dtype)
        for row, source, window in zip(tokens, located.source.tolist(), located.window.tolist(), strict=True):
            self._sources[source].read_into(window, row)
        mask = None
        if self.has_mask:
            mask = np.empty((len(tokens), self.sequence_length), np.uint8)
            for row, source, window in zip(
                mask, located.source.tolist(), located.window.tolist(), strict=True
            ):
                self._sources[source].read_mask_into(window, row)
        return Batch(tokens, located.source.astype(np.int32), mask)


class Prefetcher:
    """Reads the samples that are needed next while the caller works on others. One thread; close it when done.

    Args:
        batches: Does the reading.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[np.ndarray, int, Future[Batch]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, ns: np.ndarray) -> None:
        """Begin to read samples in the background; what was requested before and not taken is discarded.

        Args:
            ns: [n] integers.
        """
        self.discard()
        ns = np.array(ns, np.int64)
        records = len(self._batches.curriculum.first_samples)
        self._ahead = (ns, records, self._thread.submit(self._batches.read, ns))

    def take(self, ns: np.ndarray) -> Batch:
        """The samples `ns`, from what was read ahead if it is just these, and read now if not.

        What was read ahead is not used once a later record governs any of it.

        Args:
            ns: [n] integers.

        Raises:
            DataError: As `Batches.read`, whichever thread it came up in.
            EnvironmentProblem: As `Batches.read`.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            requested, records, reading = ahead
            since = self._batches.curriculum.first_samples[records:]
            stale = len(since) > 0 and len(requested) > 0 and since[0] <= requested.max()
            if not stale and np.array_equal(requested, ns):
                return reading.result()
            reading.cancel()
        return self._batches.read(ns)

    def discard(self) -> None:
        """Forget what was requested."""
        if self._ahead is not None:
            self._ahead[2].cancel()
            self._ahead = None

    def close(self) -> None:
        """Discard what was requested and end the thread."""
        self.discard()
        self._thread.shutdown(wait=True, cancel_futures=True)


def _common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The narrowest of uint16, int32 and int64 that holds what all the dtypes hold."""
    for wide in (np.dtype(np.uint16), np.dtype(np.int32)):
        if all(np.can_cast(dtype, wide) for dtype in dtypes):
            return wide
    return np.dtype(np.int64)
