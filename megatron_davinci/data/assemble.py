"""Parts to shards: documents in their order or shuffled, one after the other or packed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.job_plan import Plan
from megatron_davinci.data.manifest import Shard
from megatron_davinci.data.packing import best_fit
from megatron_davinci.data.parts import part_path, read_ends
from megatron_davinci.data.permutation import Permutation, round_keys
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors

_BLOCK_TOKENS = 1 << 21  # written at once
_BLOCK_DOCUMENTS = 1 << 14
_OPEN_FILES = 128


class Span(NamedTuple):
    """The documents of one shard: `first` to before `end`, by number of part and of document in it.

    Attributes:
        first: Part and document.
        end: Part and document after the last.
    """

    first: tuple[int, int]
    end: tuple[int, int]


class ShardPlan:
    """Which documents go into which shard, told as parts come in, in their order.

    A shard is closed before the document that would make it longer than `shard_tokens`; a document that is longer
    than this is a shard by itself. So the shards are the same however the input was parted.
    """

    def __init__(self, shard_tokens: int) -> None:
        self._limit = shard_tokens
        self._first = (0, 0)
        self._tokens = self._documents = 0

    def feed(self, part: int, ends: NDArray[np.int64]) -> Iterator[Span]:
        """The shards that are complete once this part's documents are known."""
        at = before = 0
        while at < len(ends):
            room = self._limit - self._tokens
            fits = int(np.searchsorted(ends, before + room, side="right"))
            if fits <= at:
                if self._documents:
                    yield self._close(part, at)
                    continue
                fits = at + 1
            self._tokens += int(ends[fits - 1]) - before
            self._documents += fits - at
            at, before = fits, int(ends[fits - 1])

    @property
    def open(self) -> tuple[int, int] | None:
        """The first document of the shard that is not complete; None if it has no document yet."""
        return self._first if self._documents else None

    def _close(self, part: int, document: int) -> Span:
        span = Span(self._first, (part, document))
        self._first = span.end
        self._tokens = self._documents = 0
        return span

    def finish(self, parts: int) -> Iterator[Span]:
        """The last shard."""
        if self._documents:
            yield self._close(parts, 0)


class Assembler:
    """Writes shards from parts.

    Args:
        plan: The job's.
        folder: The job's: parts are in it, and shards go into it.
        write_early: Have tokens on disk as they come, so that there is little left to wait for at the end. It pays
            where documents come more slowly than they are written.
    """

    def __init__(self, plan: Plan, folder: Path, write_early: bool = False) -> None:
        self._parts, self._out, self._dtype = folder / "parts", folder / "out", np.dtype(plan.dtype)
        self._mask, self._eod_id, self._pack = plan.fields.prompt is not None, plan.eod_id, plan.pack
        self._write_early = write_early
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._ends: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def in_order(self, number: int, first: tuple[int, int], ends: Iterable[tuple[int, int]]) -> Shard:
        """Write a shard of documents that lie one after the other.

        Args:
            number: The shard's.
            first: The first: the number of its part, and its own there.
            ends: Where to write up to, one after the other: each is the document after the last that is known by
                then, and the last one that after the shard's last.
        """
        return self._write(number, self._places_up_to(first, ends))

    def _places_up_to(
        self, first: tuple[int, int], ends: Iterable[tuple[int, int]]
    ) -> Iterator[NDArray[np.int64]]:
        for end in ends:
            yield from self._span_places(Span(first, end))
            first = end

    def _span_places(self, span: Span) -> Iterator[NDArray[np.int64]]:
        (first_part, first), (last_part, last) = span
        for part in range(first_part, last_part + (1 if last else 0)):
            ends = read_ends(self._parts, part)
            low = first if part == first_part else 0
            high = last if part == last_part else len(ends)
            yield _places(part, ends, np.arange(low, high))

    def shuffled(self, number: int, first: int, end: int, counts: NDArray[np.int64], seed: int) -> Shard:
        """Write a shard of documents `first` to before `end` of the shuffled order.

        Document `j` of that order is document `p(j)` of the input, where `p` is the keyed permutation that orders
        windows (`data.permutation`), of all documents. It takes no table; what is looked up is where a document
        lies, which takes a number for each part and, of the parts that a block of documents comes from, for each
        of theirs.

        Args:
            number: The shard's.
            first: The first.
            end: One past the last.
            counts: [parts], documents of each.
            seed: The key.
        """
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return self._write(number, self._shuffled_places(first, end, starts, seed))

    def _shuffled_places(
        self, first: int, end: int, starts: NDArray[np.int64], seed: int
    ) -> Iterator[NDArray[np.int64]]:
        permutation = Permutation(int(starts[-1]), round_keys(seed, "documents", 0))
        for low in range(first, end, _BLOCK_DOCUMENTS):
            chosen = permutation.many(np.arange(low, min(low + _BLOCK_DOCUMENTS, end)))
            part = np.searchsorted(starts, chosen, side="right") - 1
            block = np.empty((len(chosen), 3), np.int64)
            for one in np.unique(part).tolist():
                here = part == one
                block[here] = _places(one, self._part_ends(one), chosen[here] - starts[one])
            yield block

    def _part_ends(self, part: int) -> NDArray[np.int64]:
        ends = self._ends.get(part)
        if ends is None:
            ends = self._ends[part] = read_ends(self._parts, part)
            if len(self._ends) > _OPEN_FILES:
                self._ends.popitem(last=False)
        return ends

    def _write(self, number: int, places: Iterator[NDArray[np.int64]]) -> Shard:
        prefix = f"shard-{number:05d}"
        masked = self._mask or self._pack is not None
        with IndexedDatasetWriter(self._out / prefix, self._dtype, overwrite=True, mask=masked) as writer:
            if self._pack is None:
                for block in places:
                    for chosen in _blocks(block):
                        writer.add_documents(*self._read(chosen))
                    if self._write_early:
                        writer.write_early()
            else:
                self._write_packed(writer, np.concatenate(list(places)), self._pack)
        for file in self._files.values():
            file.close()
        self._files.clear()
        return Shard.of(prefix, writer.written)

    def _write_packed(
        self, writer: IndexedDatasetWriter, places: NDArray[np.int64], sequence_length: int
    ) -> None:
        """Packed sequences; the rest of one is filled with ends of documents, which carry no loss.

        Nor does the first token of a sequence: a window would predict it from the sequence before.
        """
        packed = best_fit(places[:, 2], sequence_length)
        pieces = places[packed.document]
        pieces[:, 1] += packed.start
        pieces[:, 2] = packed.length
        bounds = np.searchsorted(packed.sequence, np.arange(packed.sequences + 1))
        fill_id = 0 if self._eod_id is None else self._eod_id
        for first, end in pairwise(bounds.tolist()):
            tokens, lengths, loss = self._read(pieces[first:end])
            flags = np.ones(len(tokens), np.uint8) if loss is None else loss
            flags[0] = 0
            if rest := sequence_length - len(tokens):
                tokens = np.concatenate([tokens, np.full(rest, fill_id, self._dtype)])
                flags = np.concatenate([flags, np.zeros(rest, np.uint8)])
                lengths = np.append(lengths, rest)
            writer.add_documents(tokens, lengths, flags)
        # A window reads one token past its sequence: without this the last sequence would be none.
        writer.add_documents(np.array([fill_id], self._dtype), np.array([1], np.int64), np.zeros(1, np.uint8))

    def _read(
        self, places: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint8] | None]:
        """The tokens at [documents, (part, first token, tokens)], one after the other; lengths; loss flags."""
        lengths = places[:, 2]
        total = int(lengths.sum())
        tokens = np.empty(total, self._dtype)
        loss = np.empty(total, np.uint8) if self._mask else None
        # Documents that lie one after the other are read at once.
        ends = places[:, 1] + lengths
        breaks = np.flatnonzero((places[1:, 0] != places[:-1, 0]) | (places[1:, 1] != ends[:-1])) + 1
        written = 0
        for first, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(places)]):
            part, start = int(places[first, 0]), int(places[first, 1])
            count = int(ends[end - 1]) - start
            self._fill(part, "ids", start, tokens[written : written + count])
            if loss is not None:
                self._fill(part, "loss", start, loss[written : written + count])
            written += count
        return tokens, lengths, loss

    def _fill(self, part: int, ending: str, start: int, out: NDArray[Any]) -> None:
        if not len(out):
            return
        path = part_path(self._parts, part, ending)
        with disk_errors(path, "reading a part"):
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `_write`)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            buffer, offset = out.data.cast("B"), start * out.itemsize
            while len(buffer):
                read = os.preadv(file.fileno(), [buffer], offset)
                if read <= 0:
                    raise DataError("A part ends too early.", where=path, do="start again with --restart")
                buffer, offset = buffer[read:], offset + read


def _places(part: int, ends: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """[documents, (part, first token, tokens)] of documents of a part."""
    starts = np.concatenate([[0], ends])
    first = starts[documents]
    return np.stack([np.full(len(documents), part), first, ends[documents] - first], axis=1)


def _blocks(places: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """In blocks of some two million tokens, each of at least one document."""
    block = np.cumsum(places[:, 2]) // _BLOCK_TOKENS
    bounds = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(places)]
    return (places[first:end] for first, end in pairwise(bounds) if end > first)
