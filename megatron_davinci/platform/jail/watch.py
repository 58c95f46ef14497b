"""The processes below one: how many, what they have used, and how all of them are ended."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")


@dataclass
class Usage:
    """What a tree of processes uses.

    Attributes:
        processes: How many there are, threads of one process together.
        memory: Bytes that they have to themselves: resident and not of a file.
        cpu: Seconds, of those that have ended and were waited for too.
    """

    processes: int = 0
    memory: int = 0
    cpu: float = 0.0


def below(root: int) -> list[int]:
    """Numbers of all processes below one, the nearest first."""
    found, waiting = [], [root]
    while waiting:
        of = waiting.pop(0)
        try:
            threads = os.listdir(f"/proc/{of}/task")
        except OSError:
            continue
        for thread in threads:
            with suppress(OSError), open(f"/proc/{of}/task/{thread}/children") as file:
                children = [int(word) for word in file.read().split()]
                found += children
                waiting += children
    return found


def usage(pids: list[int]) -> Usage:
    """What these processes use; those that have gone count as nothing."""
    used = Usage()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                pages = file.read().split()
            with open(f"/proc/{pid}/stat", "rb") as file:
                words = file.read().rsplit(b")", 1)[1].split()
        except (OSError, IndexError):
            continue
        used.processes += words[0] != b"Z"
        used.memory += (int(pages[1]) - int(pages[2])) * _PAGE
        used.cpu += sum(int(word) for word in words[11:15]) / _TICKS
    return used


def size_of(folder: str) -> tuple[int, int]:
    """Bytes on disk, and how many files and folders, below a folder."""
    total, count = 0, 0
    waiting = [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # so deep that nobody can say what it holds
                return 1 << 62, count
            continue
        for entry in entries:
            count += 1
            with suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return total, count


def end_all(user: int | None) -> None:
    """End every process below this one, whatever it does against it. Orphans must be this process's children.

    Args:
        user: A user that all of them run as and nobody else does; None where there is no such user.
    """
    if user is not None:
        child = os.fork()
        if child == 0:
            with suppress(OSError):
                os.setresuid(user, user, user)
                os.kill(-1, signal.SIGKILL)  # all of this user at once: no fork can outrun it
            os._exit(0)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    until = time.monotonic() + 10
    stopped: set[int] = set()
    while time.monotonic() < until:
        # Stopped first, so that none starts another while its siblings are ended.
        living = below(os.getpid())
        new = set(living) - stopped
        if new:
            stopped |= new
            _send(list(new), signal.SIGSTOP)
            continue
        _send(living, signal.SIGKILL)
        stopped.clear()
        if not reap() and not below(os.getpid()):
            return
        time.sleep(0.002)


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)


def reap() -> bool:
    """Take note of children that have ended; whether there are others."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
