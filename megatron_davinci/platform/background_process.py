"""A process that works beside training and takes nothing from it: of the lowest priority, with one thread."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

NICE = 19
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# What a launcher tells a rank. This process is none.
_OF_A_RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def try_lock(path: Path) -> int | None:
    """Take the lock that a `BackgroundProcess` holds for as long as it lives, however it and its parent end.

    Args:
        path: A file, which is made if it is not there.

    Returns:
        A descriptor that holds it, to be handed to a process and closed; None where another process has it. Where the
        file system knows no locks, everybody gets it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
    return file


def of_no_rank() -> dict[str, str]:
    """This process's environment, without what a launcher tells a rank: for a program that is none."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_RANK and not name.startswith("TORCHELASTIC_")
    }


class BackgroundProcess:
    """A process of the lowest priority for processor and disk, which sees no GPU.

    It has a session of its own: what a terminal or a launcher sends to the group of a rank does not reach it.

    Args:
        words: The command.
        log: A file for all that it says, written anew.
        lock: What `try_lock` returned: it is the process's too from here on.

    Raises:
        OSError: It could not be started.
    """

    def __init__(self, words: Sequence[str], log: Path, lock: int) -> None:
        environment = of_no_rank()
        environment |= dict.fromkeys(_ONE_THREAD, "1") | {"CUDA_VISIBLE_DEVICES": ""}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        with open(log, "wb") as said:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(lock,),
            )
        _step_back(self._process.pid)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code, below 0 for a signal."""
        return self._process.wait()

    def end(self, *, at_once: bool = False) -> None:
        """Have it end, by SIGTERM or, at once, by SIGKILL. `wait` says when it has."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL if at_once else signal.SIGTERM)


def _step_back(pid: int) -> None:
    """Give a process that has just begun, and all threads that it will have, the lowest priority."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
    # Where the scheduler groups processes by session (sched(7), autogroup), niceness counts within a session only;
    # between sessions that of the group does.
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))
    with suppress(psutil.Error, OSError, AttributeError):
        psutil.Process(pid).ionice(psutil.IOPRIO_CLASS_IDLE)
