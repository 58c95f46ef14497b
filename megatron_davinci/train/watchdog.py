"""A rank that makes no progress: who it is, where it stands, and the end of the run.

Each rank counts its own progress in memory, and a thread of it looks at the count. Nothing is written and nothing is
sent while all goes well. When a rank has stood still for too long, it raises an alarm, a file in the run directory,
that every other rank's thread sees. Each then writes where it stands, with the stack of each of its threads. One that
writes nothing is stopped or dead; otherwise the one that came least far, and waits in no collective, is behind.

An interpreter that is locked (native code that holds the GIL) cannot write; for that, faulthandler has a thread of C
that writes the stacks unless it is told not to in time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import IO, Any

from megatron_davinci.config.health import HangConfig
from megatron_davinci.errors import HANG
from megatron_davinci.files import write_json
from megatron_davinci.train.last_words import FOLDER, now
from megatron_davinci.train.phases import PhaseTimers
from megatron_davinci.train.signals import WATCH, stacks_of_threads

_KNOWN = 5  # steps after which their length is known; the first of a start compiles and is not counted
_LATE = 50  # of so many steps the longest is looked at
# Python files in which a rank waits for others.
_COLLECTIVES = ("distributed_c10d.py", "c10d_logger.py", "p2p_communication.py", "param_and_grad_buffer.py")


class Watchdog:
    """Watches this rank.

    Args:
        run: The run directory.
        settings: When a rank stands still; None for never.
        rank: This rank.
        ranks: How many there are.
        timers: Know the phase of a step.
    """

    def __init__(
        self, run: Path, settings: HangConfig | None, rank: int, ranks: int, timers: PhaseTimers
    ) -> None:
        self._folder, self._settings, self._timers = run / FOLDER, settings, timers
        self._rank, self._ranks = rank, ranks
        self._count = 0
        self._place, self._step = "start", 0
        self._since = time.monotonic()
        self._lengths: deque[float] = deque(maxlen=_LATE)
        self._first = True
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._stacks: IO[str] | None = None

    def clear(self) -> None:
        """Take away what an earlier start has left. Rank 0 calls this, before any rank begins."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("hang.json", "rank-*.hang.json", "rank-*.stacks.txt"):
            for path in self._folder.glob(pattern):
                path.unlink(missing_ok=True)

    def begin(self) -> None:
        """Watch from here on."""
        if self._settings is None or self._thread is not None:
            return
        with contextlib.suppress(OSError):
            self._stacks = open(self._file("stacks.txt"), "w", encoding="utf-8")  # noqa: SIM115
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, place: str, step: int) -> None:
        """This rank has come to a place that every rank comes to. It costs less than a microsecond.

        Args:
            place: `step`, or what lies between steps.
            step: The step's number.
        """
        at = time.monotonic()
        if self._place == "step":
            if not self._first:
                self._lengths.append(at - self._since)
            self._first = False
        self._place, self._step, self._since = place, step, at
        self._count += 1

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join(5)
            self._thread = None
        if self._stacks is not None:
            self._stacks.close()
            self._stacks = None
            with contextlib.suppress(OSError):
                if self._file("stacks.txt").stat().st_size == 0:
                    self._file("stacks.txt").unlink()

    @property
    def limit(self) -> float | None:
        """Seconds that the present place may take; None for any."""
        assert self._settings is not None
        if self._place == "step" and len(self._lengths) >= _KNOWN:
            return max(self._settings.least_seconds, self._settings.times_longest_step * max(self._lengths))
        return self._settings.unknown_seconds

    @property
    def _tick(self) -> float:
        assert self._settings is not None
        return min(10.0, max(0.1, self._settings.least_seconds / 20))

    def _file(self, kind: str) -> Path:
        return self._folder / f"rank-{self._rank:05d}.{kind}"

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            limit, stood = self.limit, time.monotonic() - self._since
            if self._stacks is not None and limit is not None:
                # Told anew at each tick; without this thread it would come.
                faulthandler.dump_traceback_later(max(1.0, limit + self._tick - stood), file=self._stacks)
            alarm = self._folder / "hang.json"
            if limit is not None and stood > limit:
                with contextlib.suppress(OSError), open(alarm, "x", encoding="utf-8") as file:
                    json.dump({"rank": self._rank, "time": now()}, file)
            elif not alarm.exists():
                continue
            self._report(alarm)

    def _report(self, alarm: Path) -> None:
        """Say where this rank stands, read where the others do, and end; go on where it was a false alarm."""
        count = self._count
        with contextlib.suppress(Exception):
            write_json(self._file("hang.json"), self._standing())
        until = time.monotonic() + max(5.0, 4 * self._tick)
        # All of it, though all may have written by then: who is only late gets so much more time.
        while time.monotonic() < until:
            if self._count != count or self._closed.wait(0.1):
                break
        found = self._standings()
        if self._count != count or self._closed.is_set():
            # It was late, and is on its way again; so are the others, who waited for it.
            with contextlib.suppress(OSError):
                alarm.unlink(missing_ok=True)
                self._file("hang.json").unlink(missing_ok=True)
            return
        behind = who_is_behind(found, self._ranks)
        speaks = bool(found) and self._rank == min(found)
        said = self._verdict(found, behind)
        if speaks:
            with contextlib.suppress(Exception):
                write_json(
                    alarm,
                    {"rank": self._rank, "time": now(), "behind": behind, "step": self._step, "said": said},
                )
        else:
            time.sleep(1.0)  # the one that speaks ends the run for the launcher
        WATCH.leave(HANG, said, say=speaks)

    def _standing(self) -> dict[str, Any]:
        frame = sys._current_frames().get(threading.main_thread().ident or -1)
        stack = traceback.extract_stack(frame) if frame is not None else []
        names = [os.path.basename(one.filename) for one in stack]
        return {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "count": self._count,
            "step": self._step,
            "place": self._place,
            "phase": self._timers.current if self._place == "step" else None,
            "seconds": round(time.monotonic() - self._since, 1),
            "waits_for_others": any(name in _COLLECTIVES for name in names),
            "at": [f"{one.filename}:{one.lineno} in {one.name}" for one in stack[-3:]][::-1],
            "stacks": stacks_of_threads(),
        }

    def _standings(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self._ranks):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = json.loads((self._folder / f"rank-{rank:05d}.hang.json").read_text())
        return found

    def _verdict(self, found: dict[int, dict[str, Any]], behind: list[int]) -> str:
        longest = f", where the longest step of late took {max(self._lengths):.1f} s" if self._lengths else ""
        lines = [
            "A rank stands still, and the others wait for it."
            if behind
            else "Every rank stands still in a collective: they do not wait for the same one.",
            f"  where:    step {self._step:,}, {self._phase_in_words(found, behind)}; no progress for "
            f"{time.monotonic() - self._since:.0f} s{longest}",
        ]
        for number, rank in enumerate(behind[:4] or list(found)[:4]):
            lines.append(("  found:    " if not number else " " * 12) + self._of(rank, found.get(rank)))
            lines += [" " * 14 + place for place in found.get(rank, {}).get("at", ())]
        if len(behind) > 4:
            lines.append(" " * 12 + f"and {len(behind) - 4} more")
        lines.append(
            f"  do:       {self._folder}/rank-*.hang.json has the stacks of all ranks; start the same command again, "
            "and where it happens again without the node that is named (health.hang says how long is too long)"
        )
        return "\n".join(lines)

    def _of(self, rank: int, standing: dict[str, Any] | None) -> str:
        if standing is not None:
            return f"rank {rank} on {standing['host']}, process {standing['pid']}"
        where = ""
        with contextlib.suppress(OSError, ValueError):
            left = json.loads((self._folder / f"rank-{rank:05d}.json").read_text())
            where = f" on {left['host']}, process {left['pid']},"
        locked = self._folder / f"rank-{rank:05d}.stacks.txt"
        with contextlib.suppress(OSError):
            if locked.stat().st_size:
                return (
                    f"rank {rank}{where} cannot run Python: native code holds its interpreter; see {locked}"
                )
        return f"rank {rank}{where} gives no sign: it is stopped, dead, or cut off"

    def _phase_in_words(self, found: dict[int, dict[str, Any]], behind: list[int]) -> str:
        standing = next((found[rank] for rank in behind if rank in found), None)
        if standing is None:
            return self._place if self._place != "step" else "in the step"
        return str(standing["phase"] or standing["place"])


def who_is_behind(found: dict[int, dict[str, Any]], ranks: int) -> list[int]:
    """The ranks that the others wait for.

    Args:
        found: Where each rank says that it stands, by rank.
        ranks: How many there are.

    Returns:
        Those that say nothing; where all do, those that have come least far, without those that wait for others;
        empty where all wait alike.
    """
    silent = [rank for rank in range(ranks) if rank not in found]
    if silent:
        return silent
    least = min(standing["count"] for standing in found.values())
    last = {rank: standing for rank, standing in found.items() if standing["count"] == least}
    working = [rank for rank, standing in last.items() if not standing["waits_for_others"]]
    if working:
        return working
    return list(last) if len(last) < ranks else []
