"""What each rank and each launcher leave behind in the run directory, for whoever asks why a run has ended.

A rank writes one small file when it begins and again when it ends by anything that leaves it a moment: an error, a
signal, the end of the run. One that was killed leaves the first as it was. The launcher writes how its ranks ended,
which it alone has seen. `davinci doctor` reads all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_davinci.errors import DavinciError
from megatron_davinci.files import write_json

FOLDER = "ranks"
LOCK, STALE_SECONDS = "lock", 45.0  # as in `run_lock`, which imports torch


class LastWords:
    """This rank's file. One a process: `LAST_WORDS`. Nothing is written while there is no run directory."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._facts: dict[str, Any] = {}

    def begin(self, run: Path, start: int | None = None) -> None:
        """This rank is at work.

        Args:
            run: The run directory; where it is not there yet, nothing is written.
            start: The number of the start in `manifest.json`, from 1; None before that is known.
        """
        if not (run / "manifest.json").exists():
            return
        rank = int(os.environ.get("RANK", "0"))
        path = run / FOLDER / f"rank-{rank:05d}.json"
        if start is None and (_is_at_work(path) or _is_at_work(run / LOCK) or _is_held_elsewhere(run)):
            return  # a second trainer, which will be refused; the words are those of the one at work
        self._path = path
        self._facts = {
            "rank": rank,
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": start,
            "began": now(),
            "ended": None,
        }
        self._write()

    def end(self, code: int, reason: str, kind: str = "") -> None:
        """This rank ends.

        Args:
            code: What it ends with.
            reason: Why, for the reader.
            kind: The error's class, or what else it is.
        """
        if code:
            tell_torchrun(reason)
        if self._path is not None and self._facts["ended"] is None:
            self._facts["ended"] = {"code": code, "kind": kind, "reason": reason, "time": now()}
            self._write()

    def _write(self) -> None:
        # What a rank has to say must not be what ends it.
        if self._path is not None:
            with contextlib.suppress(DavinciError, OSError):
                write_json(self._path, self._facts)


def _is_at_work(path: Path) -> bool:
    """Whether the process that a rank's file, or the run's lock, names lives on this node and is another one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        other = json.loads(path.read_bytes())
        if other.get("ended") is None and other["pid"] != os.getpid():
            return is_alive(other["host"], other["pid"])
    return False


def _is_held_elsewhere(run: Path) -> bool:
    """Whether a process of another node gives signs of life by the run's lock."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((run / LOCK).read_bytes())["host"] != socket.gethostname() and is_held(run)
    return False


def is_held(run: Path) -> bool:
    """Whether the lock of a run has been renewed of late, as a trainer that lives does, wherever it is."""
    try:
        return time.time() - (run / LOCK).stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def is_alive(host: str, pid: int) -> bool:
    """Whether a process of this node is a rank still; False for one of another node, which nobody can know here."""
    if host != socket.gethostname() or pid <= 0:
        return False
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


LAST_WORDS = LastWords()


def tell_torchrun(reason: str) -> None:
    """Leave the reason where torchrun looks for one, to be in the summary that it ends with."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        said = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(said, file)


def launcher_ended(run: Path | None, code: int, failures: dict[int, int], killed_for_memory: int) -> None:
    """Write what a launcher saw.

    Args:
        run: The run directory; None where it is not known.
        code: What the launcher ends with.
        failures: What ranks ended with, by rank; below 0 for a signal.
        killed_for_memory: Processes that the kernel killed for want of memory meanwhile, in this control group.
    """
    if run is None or not (run / "manifest.json").exists() or _is_at_work(run / LOCK):
        return  # where its ranks have ended and the lock is held, it is another trainer's
    host = socket.gethostname()
    with contextlib.suppress(DavinciError, OSError):
        write_json(
            run / FOLDER / f"launcher-{host}.json",
            {
                "host": host,
                "code": code,
                "failures": {str(rank): ended for rank, ended in failures.items()},
                "killed_for_memory": killed_for_memory,
                "time": now(),
            },
        )


def killed_for_memory() -> int:
    """How many processes of this control group the kernel has killed for want of memory; 0 where it does not say."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def now() -> str:
    """The time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
