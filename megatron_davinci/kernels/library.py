"""A shared library of kernels, made by nvcc or as the emulator: both have the same functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_davinci.kernels import sources
from megatron_davinci.kernels.table import KERNELS, Kernel

C_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "l": ctypes.c_longlong, "f": ctypes.c_float}
"""What a letter of `Kernel.arguments` is to ctypes."""

EMULATOR_FAILED = 1000


class KernelError(RuntimeError):
    """A launch that failed: the driver refused it, or the emulator found something wrong."""


class Library:
    """The library, loaded.

    Args:
        path: Of the shared library.
        digest: Of the sources that it must have been made from; default: the package's.
        kernels: Those that it must have; default: all.

    Raises:
        OSError: It cannot be loaded, lacks a kernel, or was made from other sources.
    """

    def __init__(
        self, path: Path, digest: str | None = None, kernels: Iterable[Kernel] = tuple(KERNELS.values())
    ) -> None:
        loaded = ctypes.CDLL(str(path))
        self.path = path
        self._message = getattr(loaded, "davinci_emulator_message", None)
        try:
            said = loaded.davinci_kernels_digest
            said.restype = ctypes.c_char_p
            found, wanted = said().decode(), digest or sources.digest()
            if found != wanted:
                raise OSError(
                    f"{path} was made from other sources ({found}) than those that are here ({wanted})"
                )
            self._functions: dict[str, Callable[..., int]] = {}
            for kernel in kernels:
                for symbol in kernel.symbols:
                    function = getattr(loaded, f"davinci_{symbol}")
                    function.restype = ctypes.c_int
                    letters = [C_TYPES[letter] for letter in kernel.arguments]
                    function.argtypes = [ctypes.c_longlong, *letters, ctypes.c_void_p]
                    self._functions[symbol] = function
                    # Who launches says how many on a GPU; the emulator may have fewer of them.
                    for what in ("threads", "slots"):
                        has, expected = getattr(loaded, f"davinci_{what}_{symbol}")(), getattr(kernel, what)
                        if has != expected and self._message is None:
                            raise OSError(f"{path}: {symbol} has {has} {what}, not {expected}")
        except AttributeError as error:
            raise OSError(f"{path} lacks a function: {error}") from error
        if self._message is not None:
            self._message.restype = ctypes.c_char_p

    def launch(
        self, kernel: Kernel, suffix: str, blocks: int, arguments: Sequence[object], stream: int
    ) -> None:
        """Start a kernel.

        Raises:
            KernelError: The driver refused it, or the emulator found something wrong.
        """
        symbol = f"{kernel.name}_{suffix}"
        code = self._functions[symbol](blocks, *arguments, stream)
        if code == EMULATOR_FAILED and self._message is not None:
            raise KernelError(f"{symbol}: {self._message().decode()}")
        if code:
            raise KernelError(f"{symbol} was not started: CUDA error {code}")
