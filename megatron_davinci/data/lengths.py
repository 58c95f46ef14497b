"""How long documents are: exact counts of every length, in memory that does not grow with the documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.indexed import HEADER, damaged, idx_path, read_header
from megatron_davinci.data.places import Place
from megatron_davinci.data.storage import Blob, open_blob
from megatron_davinci.errors import DataError

BLOCK = 1 << 18  # documents, or sequences, read at a time

_SHORT = 1 << 16  # lengths below it are counted in an array
_WAITING = 1 << 20  # long documents that are counted at once


class Bin(NamedTuple):
    """The documents of lengths `first` to `last`.

    Attributes:
        first: The shortest that it is for, in tokens: a power of two.
        last: The longest: one less than the next.
        documents: How many there are.
        tokens: What they hold together.
    """

    first: int
    last: int
    documents: int
    tokens: int


class Lengths:
    """Counts documents by their length, exactly.

    Lengths below 65,536 are counted in an array. Longer ones are kept as pairs of length and count; k different
    lengths sum to at least k^2 / 2, so a source of 10^12 tokens has fewer than 1.5 million of them (24 MB).
    """

    def __init__(self) -> None:
        self._short = np.zeros(_SHORT, np.int64)
        self._long = np.empty((2, 0), np.int64)  # lengths, rising, and how often each
        self._waiting: list[np.ndarray] = []
        self._count_waiting = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count documents.

        Args:
            lengths: [n] int64, tokens of each; 0 or more.
        """
        short = lengths < _SHORT
        self._short += np.bincount(lengths[short], minlength=_SHORT)
        long = lengths[~short]
        if len(long):
            self._wait(np.stack([long, np.ones_like(long)]))

    def merge(self, other: Lengths) -> None:
        """Count the documents that another has counted."""
        self._short += other._short
        self._wait(other._pairs())

    @property
    def documents(self) -> int:
        """How many were counted."""
        return int(self._short.sum() + self._pairs()[1].sum())

    @property
    def empty(self) -> int:
        """How many of them have no token."""
        return int(self._short[0])

    @property
    def tokens(self) -> int:
        """What they hold together."""
        lengths, counts = self._pairs()
        return int(self._short @ np.arange(_SHORT) + lengths @ counts)

    @property
    def longest(self) -> int:
        """Tokens of the longest; 0 if there is none."""
        lengths, _ = self._counted()
        return int(lengths[-1]) if len(lengths) else 0

    def percentile(self, percent: int) -> int:
        """The shortest length that at least `percent` of 100 documents do not exceed; 0 if there are none."""
        lengths, counts = self._counted()
        if not len(lengths):
            return 0
        ends = np.cumsum(counts)
        rank = max(1, -(-percent * int(ends[-1]) // 100))
        return int(lengths[np.searchsorted(ends, rank)])

    def bins(self) -> list[Bin]:
        """Documents by powers of two, from the shortest that is not empty to the longest, without gaps."""
        lengths, counts = self._counted()
        lengths, counts = lengths[lengths > 0], counts[lengths > 0]
        if not len(lengths):
            return []
        # Exactly, where the logarithm of a float would put 2^k - 1 beside 2^k.
        firsts = 1 << np.arange(int(lengths[0]).bit_length() - 1, int(lengths[-1]).bit_length() + 1)
        cuts = np.searchsorted(lengths, firsts)
        return [
            Bin(
                int(firsts[i]),
                int(firsts[i + 1]) - 1,
                int(counts[begin:end].sum()),
                int(lengths[begin:end] @ counts[begin:end]),
            )
            for i, (begin, end) in enumerate(itertools.pairwise(cuts))
        ]

    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Every length that occurs, rising, and how often."""
        short, (long, often) = np.flatnonzero(self._short), self._pairs()
        return np.concatenate([short, long]), np.concatenate([self._short[short], often])

    def _wait(self, pairs: np.ndarray) -> None:
        if not pairs.shape[1]:
            return
        self._waiting.append(pairs)
        self._count_waiting += pairs.shape[1]
        if self._count_waiting > _WAITING:
            self._pairs()

    def _pairs(self) -> np.ndarray:
        """The long ones, [2, k]: lengths, rising, and how often each."""
        if self._waiting:
            lengths, counts = np.concatenate([self._long, *self._waiting], axis=1)
            self._waiting.clear()
            self._count_waiting = 0
            order = np.argsort(lengths, kind="stable")
            lengths, counts = lengths[order], counts[order]
            firsts = np.flatnonzero(np.diff(lengths, prepend=-1))
            sums = np.add.reduceat(counts, firsts) if len(firsts) else counts
            self._long = np.stack([lengths[firsts], sums])
        return self._long


def document_lengths(prefix: Place) -> Iterator[np.ndarray]:
    """The tokens of each document of a shard, in order, in blocks: [up to 2^18] int64.

    Twelve bytes of the index are read for a document of one sequence, and a few MB are held. What is read is checked:
    lengths, document bounds, and that they sum to the token file. The sequences' offsets are not read; `davinci data
    verify` reads them too.

    Args:
        prefix: The shard, without `.bin` or `.idx`; local, or in S3.

    Raises:
        DataError: A file is missing or damaged, or the two do not belong together.
        EnvironmentProblem: The index cannot be read.
    """
    header, idx = read_header(prefix), idx_path(prefix)
    blob = open_blob(idx)
    starts = _Starts(blob, idx, header.sequences)
    bounds_at = HEADER.size + 12 * header.sequences
    if header.document_bounds == 0:
        raise _damaged("The first document bound is wrong.", idx, bounds_at, "no bounds", 0)
    last_bound = last_token = 0
    for first in range(0, header.document_bounds, BLOCK):
        bounds = _numbers(blob, bounds_at, first, header.document_bounds, "<i8")
        here = bounds_at + 8 * first
        if first == 0 and bounds[0] != 0:
            raise _damaged("The first document bound is wrong.", idx, bounds_at, bounds[0], 0)
        if len(bad := np.flatnonzero(np.diff(bounds, prepend=last_bound) < 0)):
            i = int(bad[0])
            before = bounds[i - 1] if i else last_bound
            what = f"Document {first + i - 1:,} ends before it begins."
            raise _damaged(what, idx, here + 8 * i, bounds[i], f"{before} or more")
        ends = first + len(bounds) == header.document_bounds
        if bounds[-1] > header.sequences or (ends and bounds[-1] != header.sequences):
            raise _damaged(
                "The last document bound is not the number of sequences.",
                idx,
                here + 8 * (len(bounds) - 1),
                bounds[-1],
                header.sequences,
            )
        tokens = starts.of(bounds)
        lengths = np.diff(tokens, prepend=last_token)
        last_bound, last_token = int(bounds[-1]), int(tokens[-1])
        yield lengths if first else lengths[1:]
    blob.close()
    if last_token != header.num_tokens:
        raise DataError(
            "An index and its token file do not belong together, or one of them was cut.",
            where=idx,
            found=f"{header.num_tokens:,} tokens in {prefix.name}.bin",
            expected=f"{last_token:,} tokens, the sum of the lengths in the index",
            do="restore the file from where it came, or write the dataset again",
        )


class _Starts:
    """The token with which each sequence begins, found from front to back."""

    def __init__(self, blob: Blob, idx: Place, sequences: int) -> None:
        self._blob, self._idx, self._count = blob, idx, sequences
        self._first = 0  # the sequence that the block at hand begins with
        self._tokens = np.zeros(1, np.int64)  # where its sequences begin, and where the last ends

    def of(self, sequences: np.ndarray) -> np.ndarray:
        """The first token of each sequence: [n] int64.

        Args:
            sequences: [n] int64, not falling, and not before those of earlier calls; the number after the last
                stands for the end.
        """
        found, done = np.empty(len(sequences), np.int64), 0
        while True:
            last = self._first + len(self._tokens) - 1
            upto = int(np.searchsorted(sequences, last, side="right"))
            found[done:upto] = self._tokens[sequences[done:upto] - self._first]
            if upto == len(sequences):
                return found
            done = upto
            lengths = _numbers(self._blob, HEADER.size, last, self._count, "<i4").astype(np.int64)
            if len(bad := np.flatnonzero(lengths < 0)):
                i = last + int(bad[0])
                at = HEADER.size + 4 * i
                raise _damaged(
                    f"Sequence {i:,} has a negative length.", self._idx, at, lengths[bad[0]], "0 or more", 4
                )
            self._tokens = int(self._tokens[-1]) + np.concatenate([[0], np.cumsum(lengths)])
            self._first = last


def _numbers(blob: Blob, offset: int, first: int, count: int, dtype: str) -> np.ndarray:
    """A block of the numbers of one part of a file."""
    numbers = np.empty(min(BLOCK, count - first), dtype)
    blob.read_into(offset + first * numbers.itemsize, numbers.data.cast("B"))
    return numbers


def _damaged(what: str, idx: Place, at: int, found: object, expected: object, nbytes: int = 8) -> DataError:
    return damaged(what, idx, (at, at + nbytes), found, expected)
