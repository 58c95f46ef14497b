"""One trainer at a time in a run directory.

The file `lock` in it is locked by rank 0 for as long as its process lives: the kernel lets go of it however the
process ends, and processes that it has started do not inherit it. Its content says who holds it, and changes every
few seconds. That counts where the lock itself says nothing: on file systems without locks, and on network file
systems whose locks do not reach other machines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.files import disk_errors, make_private_folder
from megatron_davinci.platform.distributed import on_rank_zero

NAME = "lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 45.0
"""A holder on another machine whose content did not change for this long is gone."""

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def one_trainer(directory: Path) -> Iterator[None]:
    """Be the only run in a directory, on all ranks together; every rank enters and leaves.

    Raises:
        EnvironmentProblem: Another one is at work there; the message says which.
    """
    lock = RunLock(directory)
    mine: bool = False

    def take() -> None:
        nonlocal mine
        lock.acquire()
        mine = True

    on_rank_zero(take)
    try:
        yield
    finally:
        if mine:
            lock.release()


class RunLock:
    """The lock of a run directory, for one process.

    Args:
        directory: The run's; it is made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / NAME
        self._file: int | None = None
        self._made = False
        self._ends = Event()
        self._thread: Thread | None = None
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._beats = 0

    def acquire(self) -> None:
        """Take the lock. A holder on this machine that has died is passed over at once; on another, waited for.

        Raises:
            EnvironmentProblem: Somebody else holds it, or the file system failed.
        """
        with disk_errors(self._path, "locking the run directory"):
            self._made = make_private_folder(self._directory)
            waiting, since = None, time.monotonic()
            while self._file is None:
                holder, locks = self._open()
                if holder is None or _is_gone(holder, locks):
                    break
                if holder != waiting:
                    if waiting is not None or _is_here(holder):
                        self._drop()
                        raise _refusal(self._directory, holder)
                    waiting, since = holder, time.monotonic()
                    print(
                        f"{_described(holder)} left {self._path}: waiting to see whether it lives.",
                        flush=True,
                    )
                elif time.monotonic() - since > STALE_SECONDS:
                    break
                # Opened anew each time: that is when a network file system looks at what others have written.
                self._drop()
                time.sleep(min(1.0, STALE_SECONDS / 10))
            self._write()
        self._thread = Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go of it, and leave nothing behind."""
        if self._file is None:
            return
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            self._path.unlink()
        if self._made:
            with suppress(OSError):
                self._directory.rmdir()  # only if nothing came of the run
        self._drop()

    def _open(self) -> tuple[dict[str, Any] | None, bool]:
        """Open and lock the file: who has left their name in it, and whether locks work here."""
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660)
            locks = True
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(self._file)
                if error.errno in _HELD:
                    self._drop()
                    raise _refusal(self._directory, holder) from None
                if error.errno not in _NO_LOCKS:
                    self._drop()
                    raise
                locks = False
            # Who lets go removes the file; what was opened before that is no lock any more.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    return _read(self._file), locks
            self._drop()

    def _drop(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self) -> None:
        assert self._file is not None
        self._beats += 1
        said = {"host": socket.gethostname(), "pid": os.getpid(), "since": self._since}
        said |= {"machine": _machine(), "started": _started(os.getpid()), "beat": self._beats}
        content = json.dumps(said).encode() + b"\n"
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._ends.wait(BEAT_SECONDS):
            # The lock holds without it where locks work.
            with suppress(OSError):
                self._write()


def _read(file: int) -> dict[str, Any] | None:
    try:
        said = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _machine()


def _is_gone(holder: dict[str, Any], locks: bool) -> bool:
    """Whether a holder certainly lives no more, now that the file could be locked."""
    if not _is_here(holder):
        return False
    # The kernel of this machine has the last word, where it has one.
    return locks or holder.get("started") is None or _started(holder.get("pid")) != holder["started"]


def _machine() -> str:
    """The same in all processes of a machine until it starts again, containers or not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _started(pid: object) -> str | None:
    """When a process was started, so that a later one with its number is not taken for it; None if there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError):
        return None


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"


def _refusal(directory: Path, holder: dict[str, Any] | None) -> EnvironmentProblem:
    return EnvironmentProblem(
        "Another trainer is at work in this run directory.",
        where=directory,
        found="a process that has not said which" if holder is None else _described(holder).rstrip(","),
        expected="one trainer at a time",
        do="wait until it ends, or end it; for another run, give another run.directory",
    )
