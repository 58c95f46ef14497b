"""Landlock (Linux 5.13 and later): which files a process, and all that it starts, may touch. Needs no rights."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from megatron_davinci.platform.jail import system

# Bits of access, by the version of the interface that has them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_TCP = 3  # bind and connect, version 4
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2  # version 6
TRUNCATES = 3  # the version that says which files may be cut
SIGNALS = 6  # the version that keeps signals inside


def version() -> int:
    """The version of the kernel's interface; 0 where there is none."""
    try:
        return system.call(
            system.LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1), doing="asking for Landlock"
        )
    except OSError:
        return 0


def restrict(readable: Sequence[str], writable: Sequence[str], devices: Sequence[str], network: bool) -> None:
    """Allow reading and executing below some paths, everything below others, and nothing else. For good.

    Args:
        readable: Folders and files; those that are not there are left out.
        writable: Folders.
        devices: Files to be read and written.
        network: Whether TCP may be used (said from version 4 on).

    Raises:
        OSError: The kernel refused, or has none.
    """
    if not (has := version()):
        raise OSError(errno.ENOSYS, "this kernel has no Landlock, or lets nobody have it")
    handled = _ALL[max(key for key in _ALL if key <= has)]
    attributes = struct.pack("Q", handled)
    if has >= 4:
        attributes += struct.pack("Q", 0 if network else _TCP)
    if has >= SIGNALS:
        attributes += struct.pack("Q", _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL)
    rules = system.call(
        system.LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0),
        doing="a Landlock ruleset",
    )  # fmt: skip
    try:
        for paths, access in (
            (readable, _EXECUTE | _READ_FILE | _READ_DIR),
            (writable, handled),
            (devices, _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL),
        ):
            for path in paths:
                _add(rules, path, access & handled)
        system.call(system.LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0), doing="Landlock")
    finally:
        os.close(rules)


def _add(rules: int, path: str, access: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= _EXECUTE | _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL
        rule = struct.pack("=Qi", access, opened)
        system.call(
            system.LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0),
            doing=f"a Landlock rule for {path}",
        )  # fmt: skip
    finally:
        os.close(opened)
