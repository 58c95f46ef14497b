"""A root of its own for a program: what it may read is mounted there read-only, and a small disk to write on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from megatron_davinci.platform.jail import system

# The system's programs and libraries, and what they are configured by; no accounts, no keys.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/ld.so.conf",
          "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/ssl", "/etc/pki")  # fmt: skip
NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/services", "/etc/protocols")
# Without /dev/zero: mapped, it is memory that no limit of a process holds.
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
HOME = "/tmp"


def build(base: str, readable: Sequence[str], disk: int, files: int, *, processes: bool) -> bool:
    """Build it at `base` in this process's mount namespace, and go into it.

    Args:
        base: An empty folder.
        readable: Folders and files, each of which is at the same path inside.
        disk: Bytes that can be written to `/tmp`, all files together. They are in memory.
        files: How many files and folders can be made there.
        processes: Whether this is the first process of a namespace, whose `/proc` is wanted.

    Returns:
        Whether there is a `/proc`. Some containers let none be mounted.

    Raises:
        OSError: The kernel refused.
    """
    system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
    system.mount(
        "tmpfs", base, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "size=1m,nr_inodes=4096,mode=755"
    )
    _point(base + HOME, folder=True)
    system.mount(
        "tmpfs", base + HOME, "tmpfs", system.MS_NOSUID | system.MS_NODEV,
        f"size={disk},nr_inodes={files + 1},mode=777",
    )  # fmt: skip
    shown: list[str] = []
    for path in sorted({os.path.abspath(path) for path in readable}):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in shown):
            shown.append(path)
            _show(path, base)
    for path in DEVICES:
        _point(base + path, folder=False)
        system.mount(path, base + path, None, system.MS_BIND)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                         ("stderr", "/proc/self/fd/2"), ("shm", HOME)):  # fmt: skip
        if not os.path.lexists(f"{base}/dev/{name}"):  # what is shown may lie in /dev/shm
            os.symlink(target, f"{base}/dev/{name}")
    _point(f"{base}/proc", folder=True)
    mounted = False
    if processes:
        with suppress(OSError):
            system.mount(
                "proc", f"{base}/proc", "proc", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
            )
            mounted = True
    # The root itself, after all that it holds; /tmp is another mount and stays writable.
    system.change_root(base)
    flags = system.MS_REMOUNT | system.MS_BIND | system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV
    system.mount("none", "/", None, flags)
    return mounted


def _show(path: str, base: str) -> None:
    if os.path.islink(path):
        os.makedirs(os.path.dirname(base + path), exist_ok=True)
        target = os.readlink(path)
        real = os.path.realpath(path)
        # A link inside what is shown anyway stays one (/bin is usr/bin); any other becomes what it leads to.
        if real.startswith("/usr/"):
            os.symlink(target, base + path)
        else:
            _bind(real, base + path)
    else:
        _bind(path, base + path)


def _bind(path: str, target: str) -> None:
    _point(target, folder=os.path.isdir(path))
    system.mount(path, target, None, system.MS_BIND | system.MS_REC)
    system.protect(target, system.READ_ONLY | system.NO_SUID | system.NO_DEVICES)


def _point(path: str, *, folder: bool) -> None:
    """Something to mount at."""
    if folder:
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a"):
        pass
