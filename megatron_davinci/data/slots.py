"""Slots: the memory that batches are read into, seen by the trainer and by every process that reads for it.

A slot is a memory file (`memfd_create`): it has no name that a killed run could leave behind, no limit of `/dev/shm`
applies to it, and it is gone with the last process that has it open. Its layout, for a capacity of R rows:

| part   | shape           | dtype         |                                              |
|--------|-----------------|---------------|----------------------------------------------|
| plan   | [2, R]          | int64         | each row's source and window                 |
| tokens | [R, S + 1]      | a token dtype | contiguous, so that one copy takes all of it |
| mask   | [R, S]          | uint8         | only where a source has a mask               |
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_davinci.errors import EnvironmentProblem

OnSlot = Callable[[np.ndarray], Callable[[], None] | None]
"""Is called with the memory of a slot, [bytes] uint8; what it returns is called before that memory goes."""

_PAGE = 4096


class RowShape(NamedTuple):
    """What a row holds.

    Attributes:
        sequence_length: S.
        dtype: Of the tokens, by name.
        has_mask: Each row has a loss mask.
    """

    sequence_length: int
    dtype: str
    has_mask: bool

    def offsets(self, rows: int) -> tuple[int, int, int]:
        """Byte offsets of tokens and mask, and the size of it all."""
        tokens = _whole_pages(16 * rows)
        mask = tokens + _whole_pages(rows * (self.sequence_length + 1) * np.dtype(self.dtype).itemsize)
        return tokens, mask, max(_PAGE, mask + self.has_mask * _whole_pages(rows * self.sequence_length))


class Slot:
    """Memory for one batch.

    Args:
        shape: What a row holds.
        fd: Of the memory file; None for memory that only this process sees. Belongs to the slot from now on.
        on_slot: Learns of the memory whenever it is new.

    Attributes:
        capacity: Rows that it has room for.
        plan: [2, capacity] int64.
        tokens: [capacity, S + 1].
        mask: [capacity, S] uint8, or None.
        rows: The bytes of each row of `tokens`, writable.
    """

    plan: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray | None
    rows: list[memoryview]

    def __init__(self, shape: RowShape, fd: int | None = None, on_slot: OnSlot | None = None) -> None:
        self.shape, self.fd, self._on_slot = shape, fd, on_slot
        self._release: Callable[[], None] | None = None
        self.capacity = -1
        self.map(0)

    def grow(self, rows: int) -> None:
        """Have room for this many rows. Nobody may be reading into the slot."""
        if rows > self.capacity:
            if self.fd is not None:
                os.ftruncate(self.fd, self.shape.offsets(rows)[2])
            self.map(rows)

    def map(self, capacity: int) -> None:
        """Look at the memory as rows of this capacity, to which it has been grown."""
        if capacity == self.capacity:
            return
        self._let_go()
        tokens, mask, size = self.shape.offsets(capacity)
        memory = _private(size) if self.fd is None or capacity == 0 else mmap.mmap(self.fd, size)
        # Arrays keep the mapping alive: whoever still holds an old one is not left with nothing behind it.
        width = self.shape.sequence_length + 1
        count = capacity * width
        self.plan = np.frombuffer(memory, np.int64, 2 * capacity).reshape(2, capacity)
        self.tokens = np.frombuffer(memory, self.shape.dtype, count, tokens).reshape(capacity, width)
        self.mask = None
        if self.shape.has_mask:
            masks = np.frombuffer(memory, np.uint8, capacity * (width - 1), mask)
            self.mask = masks.reshape(capacity, width - 1)
        nbytes = width * self.tokens.itemsize
        view = memoryview(memory)
        self.rows = [view[at : at + nbytes] for at in range(tokens, tokens + capacity * nbytes, nbytes)]
        self.capacity = capacity
        if self._on_slot is not None and capacity:
            self._release = self._on_slot(np.frombuffer(memory, np.uint8))

    def close(self) -> None:
        """Give the memory back once no array of it is in use."""
        self._let_go()
        self.rows = []
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _let_go(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None


def memory_file() -> int:
    """The descriptor of a new memory file, empty.

    Raises:
        EnvironmentProblem: The system has none, or no descriptor is left.
    """
    if not hasattr(os, "memfd_create"):
        raise EnvironmentProblem(
            "Processes that read need memory files, which this system does not have.",
            where="data.loader.workers",
            expected="Linux",
            do="set data.loader.workers to 0: threads of the trainer read",
        )
    try:
        return os.memfd_create("davinci-slot")
    except OSError as error:
        raise EnvironmentProblem(
            "A memory file cannot be made.",
            where="data.loader",
            found=error.strerror,
            do="raise the limit of open files (ulimit -n), or lower data.loader.prefetch_steps",
        ) from error


def _private(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
