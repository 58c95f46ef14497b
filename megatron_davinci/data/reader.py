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

from megatron_davinci.data.native import library
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


class Places(NamedTuple):
    """Where windows lie.

    Attributes:
        shard: [n] int64, numbers of shards over all sources: a batch may lie in more files than may be open.
        offset: [n] int64, bytes from the start of their token files.
    """

    shard: np.ndarray
    offset: np.ndarray


_BLOCK_BYTES = 1 << 19  # are looked at while they are still in a core's own cache
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NO_LIMIT = np.iinfo(np.uint64).max


class WindowReader:
    """Fills rows with windows. For one thread at a time.

    Args:
        sources: By their numbers; all of one sequence length.
        read_threads: Threads that wait for storage at the same time.
        native: Read by `csrc/cpu` where it was built; Python gives the same rows and the same errors.

    Attributes:
        most_open: Files that it holds open at most, and again as many while it reads.
    """

    def __init__(self, sources: Sequence[Source], read_threads: int = 1, *, native: bool = True) -> None:
        self.sources = list(sources)
        self.sequence_length = self.sources[0].sequence_length
        self._library = library() if native else None
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
        sizes = [source.vocab_size for source in self.sources]
        self._limits = np.array([_NO_LIMIT if size is None else size for size in sizes], np.uint64)
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

    def place(self, source: np.ndarray, window: np.ndarray) -> Places:
        """Where windows lie.

        Args:
            source: [n] int64.
            window: [n] int64.

        Raises:
            DataError: There is no such window.
        """
        outside = (window < 0) | (window >= self._counts[source])
        if outside.any():
            at = int(np.argmax(outside))
            self.sources[int(source[at])].locate(int(window[at]))  # says what is wrong with it
        number = self._first_window[source] + window
        shard = np.searchsorted(self._ends, number, side="right")
        return Places(shard, (number - self._starts[shard]) * self._strides[shard])

    def is_cast(self, shard: int, dtype: np.dtype) -> bool:
        """Whether a shard's tokens are of another dtype than the rows, so that a read needs a second step."""
        return self._shards[shard][0].dtype != dtype

    def will_need(self, shard: int, offset: int) -> None:
        """Say that a window is read soon.

        Raises:
            DataError: As `read_cached`.
            EnvironmentProblem: As `read_cached`.
        """
        nbytes = (self.sequence_length + 1) * self._shards[shard][0].dtype.itemsize
        self._blob(shard).will_need(offset, nbytes)

    def read_cached(self, rows: Rows, places: Places, highest: np.ndarray) -> np.ndarray:
        """Fill the rows that need no waiting.

        Args:
            rows: Rows.
            places: Of their windows.
            highest: [n] uint64, is filled: the largest token of each row, without its sign.

        Returns:
            [missing] int64, rising: the rows that are not filled.

        Raises:
            DataError: A shard is not what its manifest describes.
            EnvironmentProblem: A shard cannot be opened.
        """
        every = np.arange(len(places.shard))
        missing = [every[:0]]
        for part in self._of_few_files(every, places):
            with_files = self._files(places.shard[part], rows.tokens.dtype)
            read = self._read_by_library if self._library is not None else self._read_by_python
            missing.append(part[read(rows, part, with_files, places.offset[part], highest)])
        return np.concatenate(missing)

    def wait_for(self, rows: Rows, places: Places, waiting: np.ndarray, highest: np.ndarray) -> None:
        """Fill rows that may have to wait, several at a time.

        Args:
            rows: Rows.
            places: Of their windows.
            waiting: Which rows to fill, in the order in which to read them.
            highest: As in `read_cached`.

        Raises:
            DataError: A file is shorter than it was.
            EnvironmentProblem: A file cannot be read.
        """
        if self._threads is None or len(waiting) < 2 * self.read_threads:
            self._wait_for(rows, places, waiting, highest)
            return
        share = -(-len(waiting) // self.read_threads)
        parts = [waiting[first : first + share] for first in range(0, len(waiting), share)]
        for _ in self._threads.map(lambda part: self._wait_for(rows, places, part, highest), parts):
            pass

    def check(self, rows: Rows, highest: np.ndarray) -> None:
        """Check rows against the vocabulary.

        Args:
            rows: Rows.
            highest: [n] uint64, the largest token of each. Without its sign a negative one is larger than any
                vocabulary.

        Raises:
            DataError: A token is outside its source's vocabulary.
        """
        for row in np.flatnonzero(highest >= self._limits[rows.source]).tolist():
            self.sources[int(rows.source[row])].check_tokens(int(rows.window[row]), rows.tokens[row])

    def read_masks(self, rows: Rows) -> None:
        """Fill the masks, with ones where a source has none."""
        if rows.mask is None:
            return
        has = self._with_mask[rows.source]
        rows.mask[~has] = 1
        for row in np.flatnonzero(has).tolist():
            self.sources[int(rows.source[row])].read_mask_into(int(rows.window[row]), rows.mask[row])

    def _blob(self, shard: int) -> Blob:
        blob = self._near.get(shard)
        if blob is None:
            if len(self._near) >= self.most_open:
                self._near.clear()
            source, number = self._shards[shard]
            blob = self._near[shard] = source.blob(number)
        return blob

    def _of_few_files(self, part: np.ndarray, places: Places) -> list[np.ndarray]:
        """Rows in parts that each lie in as many files as may be open."""
        if len(part) <= self.most_open or len(self._distinct(places.shard[part])) <= self.most_open:
            return [part] if len(part) else []
        return [part[first : first + self.most_open] for first in range(0, len(part), self.most_open)]

    def _distinct(self, shards: np.ndarray) -> list[int]:
        occurs = np.zeros(len(self._shards), bool)
        occurs[shards] = True
        return np.flatnonzero(occurs).tolist()

    def _files(self, shards: np.ndarray, dtype: np.dtype) -> _Files:
        blobs = {shard: self._blob(shard) for shard in self._distinct(shards)}
        of_shard = np.empty(len(self._shards), np.int32)
        for shard, blob in blobs.items():
            of_shard[shard] = -1 if self.is_cast(shard, dtype) else blob.fd
        return _Files(list(blobs.values()), of_shard[shards])

    def _read_by_library(
        self,
        rows: Rows,
        part: np.ndarray,
        files: _Files,
        offsets: np.ndarray,
        highest: np.ndarray,
        wait: bool = False,
    ) -> np.ndarray:
        assert self._library is not None
        got, highest[part] = self._library.read_windows(files.fds, offsets, rows.tokens, part, wait=wait)
        return got != rows.tokens[0].nbytes

    def _read_by_python(
        self, rows: Rows, part: np.ndarray, files: _Files, offsets: np.ndarray, highest: np.ndarray
    ) -> np.ndarray:
        is_missing = np.zeros(len(part), bool)
        block = max(1, _BLOCK_BYTES // rows.tokens[0].nbytes)
        for first in range(0, len(part), block):
            here = slice(first, first + block)
            low, high = int(part[here][0]), int(part[here][-1]) + 1
            found = read_cached(files.fds[here].tolist(), offsets[here].tolist(), rows.memory[low:high])
            is_missing[first : first + block][found] = True
            highest[low:high] = _highest(rows.tokens[low:high])
        highest[part[is_missing]] = 0
        return is_missing

    def _wait_for(self, rows: Rows, places: Places, waiting: np.ndarray, highest: np.ndarray) -> None:
        if self._library is not None:
            left = [waiting[:0]]
            for part in self._of_few_files(waiting, places):
                files = self._files(places.shard[part], rows.tokens.dtype)
                is_missing = self._read_by_library(rows, part, files, places.offset[part], highest, wait=True)
                left.append(part[is_missing])
            waiting = np.concatenate(left)
        # What is no local file; and where the library failed, this succeeds or says why not.
        for row in waiting.tolist():
            self._blob(int(places.shard[row])).read_into(int(places.offset[row]), rows.memory[row])
            highest[row] = _highest(rows.tokens[row])


class _Files(NamedTuple):
    """Files of windows: held open, and the descriptor of each window's, [n] int32; -1 for one that has none."""

    blobs: list[Blob]
    fds: np.ndarray


class Reading:
    """Rows that are being read: the first pass is made when it is made."""

    def __init__(self, reader: WindowReader, rows: Rows) -> None:
        self._reader, self._rows = reader, rows
        self._waiting = self._casts = np.empty(0, np.int64)
        self._highest = np.zeros(len(rows.source), np.uint64)
        self._error: Exception | None = None
        try:
            self._first_pass()
        except Exception as error:
            self._error = error

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left that `finish` would have to wait for."""
        return not len(self._waiting) and not len(self._casts) and self._rows.mask is None

    def finish(self) -> None:
        """Read the rest.

        Raises:
            DataError: A window is damaged, or outside the vocabulary. What the rows hold then has no meaning.
            EnvironmentProblem: A shard cannot be read.
        """
        if self._error is not None:
            raise self._error
        reader, rows = self._reader, self._rows
        if len(self._waiting):
            reader.wait_for(rows, self._places, self._waiting, self._highest)
        for row in self._casts.tolist():
            reader.sources[int(rows.source[row])].read_into(int(rows.window[row]), rows.tokens[row])
        reader.check(rows, self._highest)
        reader.read_masks(rows)

    def _first_pass(self) -> None:
        reader, rows = self._reader, self._rows
        self._places = places = reader.place(rows.source, rows.window)
        missing = reader.read_cached(rows, places, self._highest)
        if not len(missing):
            return
        # In the order of the files: a disk sees rising offsets.
        missing = missing[np.lexsort((places.offset[missing], places.shard[missing]))]
        shards = places.shard[missing].tolist()
        for shard, offset in zip(shards, places.offset[missing].tolist(), strict=True):
            reader.will_need(shard, offset)
        is_cast = np.array([reader.is_cast(shard, rows.tokens.dtype) for shard in shards], bool)
        self._casts, self._waiting = missing[is_cast], missing[~is_cast]


def _highest(tokens: np.ndarray) -> np.ndarray:
    """The largest token of each row, without its sign: [..., width] -> [...] unsigned."""
    return tokens.view(_UNSIGNED[tokens.itemsize]).max(axis=-1)
