"""Attention cut into pieces: runs of queries that see the same document, each with the keys that it sees.

Queries of one document that lie side by side on this rank are a piece. Its keys run from the document's beginning to
the piece's end, wherever they are kept, and inside the piece attention is causal. Nothing outside is computed, so the
work is that of the documents alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_davinci.model.context_parallel import SequencePart


@dataclass(frozen=True)
class Gather:
    """Rows to take from the tokens of a micro-batch.

    Attributes:
        rows: [taken] int64; None for all of them as they are.
        inverse: [tokens] int64, where each row went; None unless every one is taken just once.
    """

    rows: Tensor | None
    inverse: Tensor | None

    def take(self, tokens: Tensor) -> Tensor:
        """Take the rows of [tokens, ...]."""
        if self.rows is None:
            return tokens
        if self.inverse is None:
            return tokens.index_select(0, self.rows)
        return _Permute.apply(tokens, self.rows, self.inverse)

    def put_back(self, taken: Tensor) -> Tensor:
        """Undo `take`, where every row was taken once."""
        if self.rows is None:
            return taken
        return _Permute.apply(taken, self.inverse, self.rows)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a micro-batch on this rank. All are causal, aligned at their ends.

    Attributes:
        queries: Brings the queries into the pieces' order.
        keys: Brings keys and values into it; from all context-parallel ranks, one behind the other.
        groups: (pieces, queries in each, keys in each) of neighbouring pieces of one size.
        query_bounds: [pieces + 1] int32, where each piece's queries begin and end.
        key_bounds: The same of its keys.
        longest_queries: Of one piece.
        longest_keys: Of one piece.
    """

    queries: Gather
    keys: Gather
    groups: tuple[tuple[int, int, int], ...]
    query_bounds: Tensor
    key_bounds: Tensor
    longest_queries: int
    longest_keys: int


def cut(starts: np.ndarray, part: SequencePart, device: torch.device, *, by_size: bool) -> Pieces:
    """Cut a micro-batch into pieces.

    Args:
        starts: [batch, length] int64, where the document of each position begins.
        part: The part of each sequence whose queries are here.
        device: Where the tensors are needed.
        by_size: Order pieces by their size, so that those of one size are computed together; otherwise as they lie.
    """
    row, begin, size, seen = _find(starts, part)
    if by_size:
        order = np.lexsort((seen, size))
        row, begin, size, seen = (x[order] for x in (row, begin, size, seen))
    batch = starts.shape[0]
    # On this rank position `chunk + offset` lies at `offset` behind the chunks before it.
    local = np.concatenate([np.arange(*chunk) for chunk in part.chunks])
    here = np.full(part.length, -1, np.int64)
    here[local] = np.arange(len(local))
    queries = here[_runs(begin, size)] * batch + np.repeat(row, size)
    keys = part.gathered_places()[_runs(begin + size - seen, seen)] * batch + np.repeat(row, seen)
    return Pieces(
        _gather(queries, len(local) * batch, device),
        _gather(keys, part.length * batch, device),
        _groups(size, seen),
        _bounds(size, device),
        _bounds(seen, device),
        int(size.max()),
        int(seen.max()),
    )


@lru_cache(maxsize=16)
def cut_whole(batch: int, part: SequencePart, device: torch.device, *, by_size: bool) -> Pieces:
    """The pieces of a micro-batch in which every sequence is one document."""
    return cut(np.zeros((batch, part.length), np.int64), part, device, by_size=by_size)


def _find(starts: np.ndarray, part: SequencePart) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, first position, queries and keys of every piece: row by row, and chunk by chunk within a row."""
    rows, begins, sizes, chunks = [], [], [], []
    for number, (first, last) in enumerate(part.chunks):
        positions = np.arange(first, last)
        heads = starts[:, first:last] == positions
        heads[:, 0] = True
        row, offset = np.nonzero(heads)
        # Every row begins with a piece, so a piece ends where the next begins, or with its row.
        flat = row * len(positions) + offset
        rows.append(row)
        begins.append(first + offset)
        sizes.append(np.diff(flat, append=heads.size))
        chunks.append(np.full(len(row), number))
    row, begin, size = (np.concatenate(x) for x in (rows, begins, sizes))
    order = np.lexsort((begin, np.concatenate(chunks), row))
    row, begin, size = row[order], begin[order], size[order]
    return row, begin, size, begin + size - starts[row, begin]


def _runs(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`begin, begin + 1, …` for each begin, `size` numbers of it."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(begins - before, sizes) + np.arange(sizes.sum())


def _gather(rows: np.ndarray, tokens: int, device: torch.device) -> Gather:
    inverse = None
    if len(rows) == tokens:
        if np.array_equal(rows, np.arange(tokens)):
            return Gather(None, None)
        back = np.full(tokens, -1)
        back[rows] = np.arange(tokens)
        # As many rows as tokens may still be some of them twice: keys that both chunks of a rank see.
        if back.min() >= 0:
            inverse = torch.from_numpy(back).to(device, non_blocking=True)
    return Gather(torch.from_numpy(rows).to(device, non_blocking=True), inverse)


def _groups(size: np.ndarray, seen: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    changes = np.flatnonzero((np.diff(size) != 0) | (np.diff(seen) != 0)) + 1
    firsts = np.concatenate([[0], changes])
    counts = np.diff(firsts, append=len(size))
    return tuple((int(n), int(q), int(k)) for n, q, k in zip(counts, size[firsts], seen[firsts], strict=True))


def _bounds(sizes: np.ndarray, device: torch.device) -> Tensor:
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return torch.from_numpy(ends).to(device, non_blocking=True)


class _Permute(torch.autograd.Function):
    """`index_select` by a permutation, whose gradient is one too and not a sum into zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None
