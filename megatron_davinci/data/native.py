"""The functions of `csrc/cpu`: reads and the shuffle in C++, where the package was installed with a compiler.

Without them the same is done in Python, with the same results. Which of the two it is, is decided here and nowhere
else. A call lets go of the interpreter lock for as long as it lasts: a thread of the trainer that reads a batch
holds up no training.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_davinci.errors import EnvironmentProblem

SWITCH = "DAVINCI_NATIVE"
"""An environment variable: 0 never uses the library, 1 will not do without it. Default: use it where it is."""

INTERFACE = 1
PATH = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")

_log = logging.getLogger(__name__)
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Library:
    """The library, loaded. Its methods may be called by several threads at once.

    The C++ writes where it is told to, so every address is taken here, from an array of the right shape and dtype.

    Args:
        path: Of the shared library.

    Raises:
        OSError: It cannot be loaded, or was built from other sources than these.
    """

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        try:
            interface = loaded.davinci_interface()
            self._read, self._permute = loaded.davinci_read_windows, loaded.davinci_permute
        except AttributeError as error:
            raise OSError(f"{path} is another library: {error}") from error
        if interface != INTERFACE:
            raise OSError(f"{path} has interface {interface}, and this package interface {INTERFACE}")
        self._read.restype = self._permute.restype = _INT64
        self._read.argtypes = [_INT64, *[_POINTER] * 3, _INT64, _INT32, _INT32, *[_POINTER] * 2]
        self._permute.argtypes = [_INT64, *[_POINTER] * 2, _INT64, *[_POINTER] * 5]

    def read_windows(
        self,
        fds: np.ndarray,
        offsets: np.ndarray,
        tokens: np.ndarray,
        rows: np.ndarray,
        *,
        wait: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fill rows with ranges of files, one read each.

        Args:
            fds: [n] integers, descriptor of each range's file; -1 for one that has none.
            offsets: [n] integers, first byte of each range.
            tokens: [any, width] integers, contiguous and writable.
            rows: [n] integers, the row of `tokens` that each range goes to.
            wait: Wait for the disk; without, only what the page cache holds is read.

        Returns:
            [n] int64, the bytes of each range that were read, or minus an errno: a row that is not whole has no
            meaning. And [n] uint64, the largest token of each row without its sign; 0 where a row is not whole.
        """
        count = len(rows)
        if not (tokens.ndim == 2 and tokens.flags.c_contiguous and tokens.flags.writeable):
            raise ValueError("rows must be those of a contiguous, writable matrix")
        if not len(fds) == len(offsets) == count:
            raise ValueError(f"{len(fds)} files and {len(offsets)} offsets for {count} rows")
        if count and not 0 <= int(rows.min()) <= int(rows.max()) < len(tokens):
            raise ValueError(f"rows must be 0 to {len(tokens) - 1}")
        nbytes = tokens.shape[1] * tokens.itemsize
        fds, offsets = np.ascontiguousarray(fds, np.int32), np.ascontiguousarray(offsets, np.int64)
        addresses = np.ascontiguousarray(tokens.ctypes.data + rows * nbytes, np.int64)
        got, highest = np.empty(count, np.int64), np.empty(count, np.uint64)
        done = self._read(
            count,
            _at(fds),
            _at(offsets),
            _at(addresses),
            nbytes,
            tokens.itemsize,
            wait,
            _at(got),
            _at(highest),
        )
        if done < 0:
            raise ValueError(f"no token has {tokens.itemsize} bytes")
        return got, highest

    def permute(
        self,
        positions: np.ndarray,
        which: np.ndarray,
        sizes: np.ndarray,
        a: np.ndarray,
        b: np.ndarray,
        keys: np.ndarray,
    ) -> np.ndarray:
        """As `permutation.permute`, which this is a form of.

        Raises:
            ValueError: A permutation or a position is none.
        """
        positions, which, sizes, a, b = (
            np.ascontiguousarray(array, np.int64) for array in (positions, which, sizes, a, b)
        )
        keys = np.ascontiguousarray(keys, np.uint64)
        count, permutations = len(positions), len(sizes)
        if len(which) != count or not len(a) == len(b) == permutations or keys.shape != (8, permutations):
            raise ValueError("arrays of different lengths")
        result = np.empty(count, np.int64)
        arrays = (_at(array) for array in (sizes, a, b, keys, result))
        done = self._permute(count, _at(positions), _at(which), permutations, *arrays)
        if done != count:
            wrong = "a permutation" if done < 0 else f"element {done}"
            raise ValueError(f"{wrong} is out of range")
        return result


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The library; None where Python does its work.

    Raises:
        EnvironmentProblem: `DAVINCI_NATIVE` is 1 and there is none.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0":
        _log.debug("data is read by Python: %s is 0", SWITCH)
        return None
    try:
        found = Library(PATH)
    except OSError as error:
        if wanted == "1":
            raise EnvironmentProblem(
                f"The C++ library is asked for ({SWITCH}=1) and cannot be used.",
                where=PATH,
                found=str(error),
                do="install a C++17 compiler and run `pip install -e .` again, or unset the variable",
            ) from error
        _log.debug("data is read by Python: %s", error)
        return None
    _log.debug("data is read by %s", PATH)
    return found


def _at(array: np.ndarray) -> int:
    return int(array.ctypes.data)
