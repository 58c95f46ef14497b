"""Token sequences laid into rows so that what several of them begin with is there, and computed, once.

Sequences are sorted, so that those that begin alike are neighbours, and put into rows one by one: what a sequence has
in common with the one before it in its row is not written again. A multiple-choice question is then written once with
all its options behind it, and few-shot examples once for many questions. Whether a sequence joins a row or begins
another follows from what either costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass
class Row:
    """Tokens of several sequences.

    Attributes:
        tokens: The tokens.
        parents: The place of the token before each in its sequence; -1 for a first one.
        paths: By the sequence's number, the places of its tokens: int64 [its length].
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: dict[int, Integers] = field(default_factory=dict)

    def add(self, number: int, sequence: Sequence[int], shared: int, before: int | None) -> None:
        """Write a sequence, of which `shared` tokens are those of the sequence `before`."""
        first = len(self.tokens)
        new = np.arange(first, first + len(sequence) - shared, dtype=np.int64)
        head = self.paths[before][:shared] if before is not None else new[:0]
        self.tokens.extend(sequence[shared:])
        self.parents.extend([int(head[-1]) if shared else -1, *new[:-1].tolist()] if len(new) else [])
        self.paths[number] = np.concatenate([head, new])


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass.

    Attributes:
        tokens: int64 [rows, length], 0 behind a row's end.
        positions: int64 [rows, length].
        sees: bool [rows, length, length], which tokens each token sees; one behind a row's end sees itself. None
            where no row has more than one sequence: each token then sees itself and all before it.
        paths: By the sequence's number, where its tokens lie: `row * length + place`, int64 [its length].
    """

    tokens: Integers
    positions: Integers
    sees: NDArray[np.bool_] | None
    paths: dict[int, Integers]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """Lay rows under each other."""
        length = max(len(row.tokens) for row in rows)
        tokens = np.zeros((len(rows), length), np.int64)
        positions = np.zeros((len(rows), length), np.int64)
        sees = None
        if any(len(row.paths) > 1 for row in rows):
            sees = np.zeros((len(rows), length, length), bool)
            sees[:, np.arange(length), np.arange(length)] = True
        paths: dict[int, Integers] = {}
        for number, row in enumerate(rows):
            tokens[number, : len(row.tokens)] = row.tokens
            for begin, end, parent in _runs(row.parents):
                if sees is not None:
                    if parent >= 0:
                        sees[number, begin:end, : parent + 1] = sees[number, parent, : parent + 1]
                    sees[number, begin:end, begin:end] = np.tri(end - begin, dtype=bool)
                depth = positions[number, parent] + 1 if parent >= 0 else 0
                positions[number, begin:end] = np.arange(depth, depth + end - begin)
            paths |= {which: path + number * length for which, path in row.paths.items()}
        return cls(tokens, positions, sees, paths)


def batches(
    sequences: Sequence[Sequence[int]],
    *,
    tokens: int,
    balance: float,
    longest_row: int = 4096,
    sequences_at_once: int = 2**62,
) -> Iterator[list[Row]]:
    """Cut sequences into batches of rows, the longest rows first.

    Args:
        sequences: Token ids; none is empty.
        tokens: A batch has at most so many places, or one row.
        balance: The length of a row at which attention costs as much as the rest of the model.
        longest_row: A row of several sequences is no longer.
        sequences_at_once: A batch has at most so many sequences.
    """
    rows = pack(sequences, balance=balance, longest_row=longest_row, most=sequences_at_once)
    rows.sort(key=lambda row: -len(row.tokens))
    batch: list[Row] = []
    count = 0
    for row in rows:
        length = len((batch or [row])[0].tokens)
        full = (len(batch) + 1) * length > tokens or count + len(row.paths) > sequences_at_once
        if batch and full:
            yield batch
            batch, count = [], 0
        batch.append(row)
        count += len(row.paths)
    if batch:
        yield batch


def alike(rows: Sequence[Row], *, pass_costs: int) -> Iterator[list[Row]]:
    """Cut a batch where padding its shorter rows would cost more than another forward pass.

    Args:
        rows: The longest first.
        pass_costs: What a pass costs besides its tokens, in tokens.
    """
    part: list[Row] = []
    padding = 0
    for row in rows:
        missing = len(part[0].tokens) - len(row.tokens) if part else 0
        if padding + missing > pass_costs:
            yield part
            part, padding, missing = [], 0, 0
        part.append(row)
        padding += missing
    if part:
        yield part


def pack(
    sequences: Sequence[Sequence[int]], *, balance: float, longest_row: int = 4096, most: int = 2**62
) -> list[Row]:
    """Lay sequences into rows, at most `most` into each; every one is in one row, whole. See `batches`."""
    order = sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))
    rows: list[Row] = []
    last: int | None = None
    for number in order:
        sequence = sequences[number]
        shared = common(sequences[last], sequence) if last is not None else 0
        joins = last is not None and len(rows[-1].paths) < most
        if not joins or not _joins(len(rows[-1].tokens), len(sequence), shared, balance, longest_row):
            rows.append(Row())
            shared, last = 0, None
        rows[-1].add(number, sequence, shared, last)
        last = number
    return rows


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differ[0]) if len(differ) else length


def _joins(row: int, length: int, shared: int, balance: float, longest_row: int) -> bool:
    """Whether `length` tokens, `shared` of them there already, had better join a row of `row` tokens.

    A token costs 1, and as much again for every `balance` tokens of its row, seen or not.
    """
    joined = row + length - shared
    if joined > longest_row:
        return False

    def cost(tokens: int) -> float:
        return tokens * (1 + tokens / balance)

    return cost(joined) - cost(row) <= cost(length)


def _runs(parents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Begin, end and parent of each run of tokens that follow one another."""
    begin = 0
    for place in range(1, len(parents) + 1):
        if place == len(parents) or parents[place] != place - 1:
            yield begin, place, parents[begin]
            begin = place
