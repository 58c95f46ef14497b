"""Many integers in little memory: those of an index that is being written."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 16  # integers in memory


class Spool:
    """Integers in the order they come; whole blocks of them lie in a file without a name, which goes by itself.

    Args:
        typecode: `i` for int32, `q` for int64.
        folder: Where the file is made, once there is a block.
    """

    def __init__(self, typecode: str, folder: Path) -> None:
        self._pending, self._folder = array(typecode), folder
        self._file: IO[bytes] | None = None
        self._filed = 0

    def __len__(self) -> int:
        """How many there are, after `close` too."""
        return self._filed + len(self._pending)

    def extend(self, values: npt.ArrayLike) -> None:
        """Append.

        Raises:
            OSError: The disk is full or failing.
        """
        self._pending.frombytes(np.ascontiguousarray(values, self._pending.typecode).tobytes())
        if len(self._pending) >= _BLOCK:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            left = memoryview(self._pending.tobytes())
            while left:
                left = left[self._file.write(left) :]
            self._filed += len(self._pending)
            self._pending = array(self._pending.typecode)

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them from the first on: [n] int32 or int64, none empty."""
        dtype = np.dtype(self._pending.typecode)
        if self._file is not None:
            self._file.seek(0)
            while len(block := np.fromfile(self._file, dtype, _BLOCK)):
                yield block
        if self._pending:
            yield np.frombuffer(self._pending, dtype)

    def close(self) -> None:
        """Do away with the file."""
        if self._file is not None:
            self._file.close()
