"""Samples by number as arrays of tokens."""

from __future__ import annotations

from collections.abc import Mapping
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
        sources: By the numbers that the curriculum gives them.
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
        self.sources = [sources[name] for name in curriculum.sources]
        self.has_mask = any(source.has_mask for source in self.sources)
        self.dtype = _common_dtype([source.dtype for source in self.sources])

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
            self.sources[source].read_into(window, row)
        mask = None
        if self.has_mask:
            mask = np.empty((len(tokens), self.sequence_length), np.uint8)
            for row, source, window in zip(
                mask, located.source.tolist(), located.window.tolist(), strict=True
            ):
                self.sources[source].read_mask_into(window, row)
        return Batch(tokens, located.source.astype(np.int32), mask)


def _common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The narrowest of uint16, int32 and int64 that holds what all the dtypes hold."""
    for wide in (np.dtype(np.uint16), np.dtype(np.int32)):
        if all(np.can_cast(dtype, wide) for dtype in dtypes):
            return wide
    return np.dtype(np.int64)
