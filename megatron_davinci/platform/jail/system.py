"""What the jail asks of the kernel and Python has no name for: system calls, by number and by `ctypes`."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

MACHINE = platform.machine()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4  # of mount_setattr(2)

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_KEEPCAPS, _CAPBSET_DROP = 1, 4, 8, 24
_SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 36, 38, 47
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # capabilities

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "capget": 125, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "capset": 91, "capget": 90, "seccomp": 277},
}
# The same number everywhere, as of all calls that Linux got since 5.1.
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446


def known() -> bool:
    """Whether the numbers of this processor's system calls are known here."""
    return MACHINE in _NUMBERS


def call(name: str | int, *arguments: object, doing: str | None = None) -> int:
    """A system call.

    Args:
        name: Its number, or a name of `_NUMBERS`.
        arguments: As `ctypes` takes them.
        doing: What the error says was being done.

    Raises:
        OSError: It failed.
    """
    number = name if isinstance(name, int) else _NUMBERS[MACHINE][name]
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), doing or str(name))


def _checked(result: int, doing: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2): new namespaces for this process (of processes: for its children)."""
    _checked(_libc.unshare(flags), "new namespaces")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), kind.encode() if kind else None, ctypes.c_ulong(flags),
        options.encode(),
    )  # fmt: skip
    _checked(result, f"mounting {source} at {target}")


def protect(target: str, attributes: int) -> None:
    """Make a mount, and all mounts below it, read-only and the like (mount_setattr(2), Linux 5.12)."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    call(
        MOUNT_SETATTR, ctypes.c_int(_AT_FDCWD), os.fsencode(target), ctypes.c_uint(_AT_RECURSIVE), wanted,
        ctypes.c_size_t(len(wanted)), doing=f"making {target} read-only",
    )  # fmt: skip


def change_root(folder: str) -> None:
    """Make a mount the root of this process's file system, and let go of the old one."""
    os.chdir(folder)
    call("pivot_root", b".", b".", doing="changing the root")
    _checked(_libc.umount2(b".", MNT_DETACH), "letting go of the old root")
    os.chdir("/")


def _prctl(option: int, first: int, second: int = 0) -> None:
    _checked(
        _libc.prctl(option, *(ctypes.c_ulong(value) for value in (first, second, 0, 0))), f"prctl {option}"
    )


def end_with_parent(signal: int) -> None:
    """Get this signal when the thread that started this process ends."""
    _prctl(_SET_PDEATHSIG, signal)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """Let no other process of this user look into this one."""
    _prctl(_SET_DUMPABLE, 0)


def gain_nothing() -> None:
    """No program that is executed from here on has more rights than this process (set-user-id and the like)."""
    _prctl(_SET_NO_NEW_PRIVS, 1)


def permitted() -> int:
    """The capabilities that this process may have, as bits."""
    data = ctypes.create_string_buffer(24)
    call("capget", struct.pack("Ii", 0x20080522, 0), data, doing="reading capabilities")
    low = struct.unpack("IIIIII", data.raw)
    return int(low[1] | low[4] << 32)


def become(user: int) -> None:
    """Become a user, in no group but that of its number, who keeps its capabilities until `keep_only`."""
    _prctl(_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def keep_only(capability: int | None) -> None:
    """Let go of all capabilities but one (or none), which programs that are executed then have as well."""
    for number in range(64):
        if number != capability:
            try:
                _prctl(_CAPBSET_DROP, number)
            except OSError:  # EINVAL beyond the last one; EPERM where it could not be had anyway
                break
    bits = 0 if capability is None else 1 << capability
    data = struct.pack("IIIIII", bits, bits, bits, 0, 0, 0)
    call("capset", struct.pack("Ii", 0x20080522, 0), data, doing="letting go of capabilities")
    if capability is not None:
        _prctl(_CAP_AMBIENT, 2, capability)


def install_filter(program: bytes) -> None:
    """Put a seccomp filter over this process and all that it starts, for good. See `filter.py`."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    call("seccomp", ctypes.c_uint(1), ctypes.c_uint(0), head, doing="the seccomp filter")
