"""Reading datasets from end to end: the digest of their bytes and a look at every token, several shards at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event, Lock
from typing import TypeVar

import numpy as np

from megatron_davinci.data.indexed import IndexedDataset, bin_path
from megatron_davinci.data.places import Place
from megatron_davinci.data.storage import open_blob
from megatron_davinci.errors import DataError
from megatron_davinci.platform.cores import usable_cores

THREADS = min(8, usable_cores())

_CHUNK = 8 << 20
_BLOCK = 1 << 18  # documents looked up at a time
_T = TypeVar("_T")
_R = TypeVar("_R")


class TokenCheck:
    """Looks at a dataset's tokens as they pass by, from the first to the last.

    Args:
        dataset: Whose tokens they are.
        vocab_size: Ids are below it; None for no bound but zero.
        eod_id: The token that every document with tokens ends with; None for no such token.
        packed: Tokens of a sequence, where documents are packed: one that ends where a sequence does may be cut.

    Attributes:
        highest: The largest id so far; -1 before the first.
        problems: The first token outside the vocabulary, and the first document that ends otherwise.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        vocab_size: int | None,
        eod_id: int | None,
        packed: int | None = None,
    ) -> None:
        self._dataset, self._vocab_size, self._eod_id, self._packed = dataset, vocab_size, eod_id, packed
        self._ends = _last_tokens(dataset)
        self._waiting = np.empty(0, np.int64)
        self._outside: DataError | None = None
        self._endless: DataError | None = None
        self.highest = -1

    @property
    def problems(self) -> list[DataError]:
        """What was found so far, at most one of each kind."""
        return [problem for problem in (self._outside, self._endless) if problem is not None]

    def look(self, raw: memoryview, first: int) -> int:
        """Look at the next tokens.

        Args:
            raw: Their bytes.
            first: The number of the first of them.

        Returns:
            How many they were.
        """
        tokens = np.frombuffer(raw, self._dataset.dtype)
        highest, lowest = int(tokens.max()), int(tokens.min())
        self.highest = max(self.highest, highest)
        beyond = self._vocab_size is not None and highest >= self._vocab_size
        if (lowest < 0 or beyond) and self._outside is None:
            at = int(np.argmin(tokens) if lowest < 0 else np.argmax(tokens))
            self._outside = DataError(
                "A token file holds a token outside the vocabulary.",
                where=self._where(first + at),
                found=int(tokens[at]),
                expected="0 or more" if self._vocab_size is None else f"0 to {self._vocab_size - 1:,}",
                do="check which tokenizer made the dataset",
            )
        if self._eod_id is not None and self._endless is None:
            last = self._until(first + len(tokens))
            if self._packed is not None:
                last = last[(last + 1) % self._packed != 0]
            other = last[tokens[last - first] != self._eod_id]
            if len(other):
                self._endless = DataError(
                    "A document does not end with the end-of-document token.",
                    where=self._where(int(other[0])),
                    found=int(tokens[other[0] - first]),
                    expected=self._eod_id,
                    do="give the token that ends the documents; if none does, say that there is none",
                )
        return len(tokens)

    def _until(self, stop: int) -> np.ndarray:
        """The documents' last tokens before token `stop` that were not asked for yet."""
        while len(self._waiting) == 0 or self._waiting[-1] < stop:
            block = next(self._ends, None)
            if block is None:
                break
            self._waiting = np.concatenate([self._waiting, block])
        cut = int(np.searchsorted(self._waiting, stop))
        taken, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return taken

    def _where(self, token: int) -> str:
        itemsize = self._dataset.dtype.itemsize
        return (
            f"{bin_path(self._dataset.prefix)}, bytes {token * itemsize:,} to {(token + 1) * itemsize:,}, "
            f"token {token:,}"
        )


def _last_tokens(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """The number of each document's last token, in blocks; a document without tokens has none."""
    bounds, start = dataset.document_indices, 0
    for first in range(0, len(bounds) - 1, _BLOCK):
        block = bounds[first : first + _BLOCK + 1]
        lengths = dataset.sequence_lengths[block[0] : block[-1]]
        ends = start + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[block - block[0]]
        start = int(ends[-1])
        yield ends[1:][ends[1:] > ends[:-1]] - 1


class Meter:
    """Counts bytes that several threads read, and can stop them.

    Args:
        total: Bytes in all.
        progress: Called with bytes done and bytes in all, by one thread at a time.
    """

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._lock, self._stopped = 0, Lock(), Event()

    def add(self, nbytes: int) -> None:
        """Count bytes.

        Raises:
            CancelledError: `stop` was called: nobody waits for what this thread reads.
        """
        if self._stopped.is_set():
            raise CancelledError
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def stop(self) -> None:
        """End the threads that count here, at their next piece."""
        self._stopped.set()


def read_through(path: Place, meter: Meter, check: TokenCheck | None = None) -> str:
    """Read a token file once, in pieces of 8 MiB.

    Args:
        path: The `.bin`.
        meter: Is told each piece's bytes.
        check: Looks at the tokens.

    Returns:
        Hex SHA-256 of its bytes.

    Raises:
        DataError: There is no such file, or it shrinks meanwhile.
        EnvironmentProblem: It cannot be read.
    """
    blob, digest = open_blob(path), hashlib.sha256()
    piece, token = bytearray(min(_CHUNK, blob.size)), 0
    for first in range(0, blob.size, _CHUNK):
        part = memoryview(piece)[: min(_CHUNK, blob.size - first)]
        blob.read_into(first, part)
        digest.update(part)
        if check is not None:
            token += check.look(part, token)
        meter.add(len(part))
    blob.close()
    return digest.hexdigest()


def in_threads(action: Callable[[_T], _R], items: Iterable[_T], threads: int, meter: Meter) -> list[_R]:
    """What `action` makes of each item, in order. The first error, or Ctrl-C, ends the others soon."""
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        return list(pool.map(action, items))
    except BaseException:
        meter.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
