"""The library that makes file-system calls fail: built, loaded into the ranks' server, armed by the tests here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
BUILT = Path(__file__).parents[2] / ".pytest_cache" / "faults"


class Mode(IntEnum):
    """What happens at the N-th call; the numbers are those of `shim.c`."""

    COUNT = 0
    KILL = 1
    HALF_THEN_KILL = 2
    IO_ERROR = 3
    NO_SPACE = 4
    SHORT = 5
    FULL_FROM_HERE = 6
    DEAD = 7
    HALF_THEN_DEAD = 8


def build() -> Path | None:
    """The library, compiled if it has not been; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = BUILT / f"{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", made, SOURCE, "-ldl"], check=True, capture_output=True
        )
        os.replace(made, library)
    return library


@contextmanager
def preloaded() -> Iterator[None]:
    """Programs that are started in this context have the library in them, where there is a compiler."""
    before, library = os.environ.get("LD_PRELOAD"), build()
    if library is not None:
        os.environ["LD_PRELOAD"] = str(library)
    try:
        yield
    finally:
        forget(before)


def forget(before: str | None = None) -> None:
    """Start no more programs with the library."""
    os.environ.pop("LD_PRELOAD", None)
    if before is not None:
        os.environ["LD_PRELOAD"] = before


@dataclass
class Calls:
    """Calls under a folder.

    Attributes:
        number: How many.
        names: Their names, in order.
        paths: What each was about; of two paths the second.
    """

    number: int = 0
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextmanager
def armed(folder: Path, call: int, mode: Mode) -> Iterator[Calls]:
    """In this context, a call under a folder fails; gives what was called, once it is over."""
    library = ctypes.CDLL(None)
    library.faults_names.restype = ctypes.c_char_p
    library.faults_calls.restype = ctypes.c_long
    calls = Calls()
    library.faults_arm(os.fsencode(folder), ctypes.c_long(call), int(mode))
    try:
        yield calls
    finally:
        library.faults_disarm()
        calls.number = library.faults_calls()
        lines = [line.split(" ", 1) for line in library.faults_names().decode().splitlines()]
        calls.names, calls.paths = [name for name, _ in lines], [path for _, path in lines]
