"""Many windows at once, each by one read into its row: first what memory holds, then what the disk has to bring.

A reader passes twice over what it is given. The first pass reads each window that needs no waiting, and has the
storage begin to fetch the others; the second waits for those. Between the two, the first pass over the *next* batch
can be made, so that storage works on both: that is the read-ahead, and it costs nothing where all is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.open_shards import open_shards
from megatron_davinci.data.source import Source
from megatron_davinci.data.storage import Blob, read_cached


class Rows(NamedTuple):
    """Rows to fill, and with what.

    Attributes:
        source: [n] int64, numbers of sources.
        window: [n] int64, windows of them.
        tokens: [n, sequence_length + 1], contiguous.
        memory: The bytes of each row of `tokens`.
        mask: [n, sequence_length] uint8, or None.
    """

    source: np.ndarray
    window: np.ndarray
    tokens: np.ndarray
    memory: Sequence[memoryview]
    mask: np.ndarray | None


_BLOCK_BYTES = 1 << 19  # are checked while they are still in a core's own cache
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# A shard by its number and not its open file: a batch may lie in more files than may be open.
_Read = tuple[int, int, memoryview]


class WindowReader:
    """Fills rows with windows. For one thread at a time.

    Args:
        sources: By their numbers; all of one sequence length.
        read_threads: Threads that wait for storage at the same time.

    Attributes:
        most_open: Files that it holds open at most, and again as many while it reads.
    """

    def __init__(self, sources: Sequence[Source], read_threads: int = 1) -> None:
        self.sources = list(sources)
        self.sequence_length = self.sources[0].sequence_length
        # Shards and windows are numbered over all sources, so that one search places all windows of a batch.
        self._counts = np.array([source.num_windows for source in self.sources], np.int64)
        self._first_window = np.cumsum(self._counts) - self._counts
        ends = [source.window_ends for source in self.sources]
        self._ends = np.concatenate([e + first for e, first in zip(ends, self._first_window, strict=True)])
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._shards = [(source, k) for source in self.sources for k in range(source.num_shards)]
        itemsize = np.array([source.dtype.itemsize for source, _ in self._shards], np.int64)
        self._strides = itemsize * self.sequence_length  # bytes from one window of a shard to its next
        self._with_mask = np.array([source.has_mask for source in self.sources])
        sizes = [source.vocab_size for source in self.sources if source.vocab_size is not None]
        self._smallest_vocabulary = min(sizes, default=None)
        self._threads = ThreadPoolExecutor(read_threads, "read") if read_threads > 1 else None
        self.read_threads = read_threads
        # A reference here spares a look into the table that all threads share, and must leave it room to let go.
        self._near: dict[int, Blob] = {}
        self.most_open = max(4, open_shards.limit // 8)

    def begin(self, rows: Rows) -> Reading:
        """Read what memory holds, and have the storage begin to fetch the rest."""
        return Reading(self, rows)

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def place(self, source: np.ndarray, window: np.ndarray) -> tuple[list[int], list[int]]:
        """Where windows lie.

        Args:
            source: [n] int64.
            window: [n] int64.

        Returns:
            [n] numbers of shards, over all sources, and [n] byte offsets in their token files.

        Raises:
            DataError: There is no such window.
        """
        outside = (window < 0) | (window >= self._counts[source])
        if outside.any():
            at = int(np.argmax(outside))
            self.sources[int(source[at])].locate(int(window[at]))  # says what is wrong with it
        number = self._first_window[source] + window
        shard = np.searchsorted(self._ends, number, side="right")
        return shard.tolist(), ((number - self._starts[shard]) * self._strides[shard]).tolist()

    def blob(self, shard: int) -> Blob:
        """The token file of a shard.

        Raises:
            DataError: It is not what its manifest describes.
            EnvironmentProblem: It cannot be opened.
        """
        blob = self._near.get(shard)
        if blob is None:
            if len(self._near) >= self.most_open:
                self._near.clear()
            source, number = self._shards[shard]
            blob = self._near[shard] = source.blob(number)
        return blob

    def window_bytes(self, shard: int) -> int:
        """Bytes of a window in a shard's token file."""
        return (self.sequence_length + 1) * self._shards[shard][0].dtype.itemsize

    def is_cast(self, shard: int, dtype: np.dtype) -> bool:
        """Whether a shard's tokens are of another dtype than the rows, so that a read needs a second step."""
        return self._shards[shard][0].dtype != dtype

    def check(self, rows: Rows, first: int, end: int) -> None:
        """Check tokens that were read against the vocabulary, as one block.

        Raises:
            DataError: A token is outside its source's vocabulary.
        """
        size = self._smallest_vocabulary
        # Without its sign a negative token is larger than any vocabulary.
        block = rows.tokens[first:end].view(_UNSIGNED[rows.tokens.itemsize])
        if size is None or int(block.max()) < size:
            return
        for row in range(first, end):
            self.sources[int(rows.source[row])].check_tokens(int(rows.window[row]), rows.tokens[row])

    def wait_for(self, reads: list[_Read]) -> None:
        """Make reads that may have to wait, several at a time."""
        if self._threads is None or len(reads) < 2 * self.read_threads:
            self._read(reads)
            return
        share = -(-len(reads) // self.read_threads)
        parts = [reads[first : first + share] for first in range(0, len(reads), share)]
        for _ in self._threads.map(self._read, parts):
            pass

    def _read(self, reads: Sequence[_Read]) -> None:
        for shard, offset, memory in reads:
            self.blob(shard).read_into(offset, memory)

    def read_masks(self, rows: Rows) -> None:
        """Fill the masks, with ones where a source has none."""
        if rows.mask is None:
            return
        has = self._with_mask[rows.source]
        rows.mask[~has] = 1
        for row in np.flatnonzero(has).tolist():
            self.sources[int(rows.source[row])].read_mask_into(int(rows.window[row]), rows.mask[row])


class Reading:
    """Rows that are being read: the first pass is made when it is made."""

    def __init__(self, reader: WindowReader, rows: Rows) -> None:
        self._reader, self._rows = reader, rows
        self._waiting: list[_Read] = []
        self._casts: list[int] = []
        self._unchecked: list[tuple[int, int]] = []
        self._error: Exception | None = None
        try:
            self._first_pass()
        except Exception as error:
            self._error = error

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left that `finish` would have to wait for."""
        return not self._waiting and not self._casts and self._rows.mask is None

    def finish(self) -> None:
        """Read the rest.

        Raises:
            DataError: A window is damaged, or outside the vocabulary. What the rows hold then has no meaning.
            EnvironmentProblem: A shard cannot be read.
        """
        if self._error is not None:
            raise self._error
        reader, rows = self._reader, self._rows
        reader.wait_for(self._waiting)
        for row in self._casts:
            reader.sources[int(rows.source[row])].read_into(int(rows.window[row]), rows.tokens[row])
        for first, end in self._unchecked:
            reader.check(rows, first, end)
        reader.read_masks(rows)

    def _first_pass(self) -> None:
        reader, rows = self._reader, self._rows
        shards, offsets = reader.place(rows.source, rows.window)
        block = max(1, _BLOCK_BYTES // (rows.tokens[0].nbytes if len(shards) else 1))
        missing: list[int] = []
        for most in range(0, len(shards), reader.most_open):
            last = min(most + reader.most_open, len(shards))
            files = {shard: reader.blob(shard) for shard in set(shards[most:last])}
            cast = {shard for shard in files if reader.is_cast(shard, rows.tokens.dtype)}
            fds = {shard: -1 if shard in cast else file.fd for shard, file in files.items()}
            for first in range(most, last, block):
                end = min(first + block, last)
                found = read_cached(
                    [fds[shard] for shard in shards[first:end]], offsets[first:end], rows.memory[first:end]
                )
                if found:
                    missing += [first + i for i in found]
                    self._unchecked.append((first, end))
                else:
                    reader.check(rows, first, end)
        # In the order of the files: a disk sees rising offsets.
        for row in sorted(missing, key=lambda row: (shards[row], offsets[row])):
            shard, offset = shards[row], offsets[row]
            reader.blob(shard).will_need(offset, reader.window_bytes(shard))
            if reader.is_cast(shard, rows.tokens.dtype):
                self._casts.append(row)
            else:
                self._waiting.append((shard, offset, rows.memory[row]))
