"""What a rank does when it is asked to end: SIGTERM, SIGUSR1 (Slurm's warning), SIGINT, SIGHUP.


The first signal asks for an orderly end: at the next step boundary all ranks agree, save a checkpoint and leave with
code 75 ("start again"). Before the first step nothing is there to save: a rank leaves at once, with the same code.
A second signal, a second or more after the first, ends the rank at once, with 128 and the signal's number; so does a
step boundary that does not come in time, and SIGQUIT.

Python runs a handler between two of its own instructions, so a rank that waits in a collective would never hear. Here
the signal's number is written to a pipe the moment it comes, by C, and a thread reads it there.

Imports nothing that takes time: `install` is called before torch is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from megatron_davinci.errors import AGAIN

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
AT_ONCE = signal.SIGQUIT
# What reaches a process twice, from a launcher and from whoever told the launcher, is one request.
ONE_REQUEST_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class SignalWatch:
    """Hears signals, on a thread of its own. One a process: `WATCH`."""

    def __init__(self) -> None:
        self._asked = 0
        self._since = 0.0
        self._grace: float | None = None  # None before the first step and after the last
        self._ended = False
        self._late = 0
        self._told: list[Callable[[int, str], None]] = []
        self._launcher: int | None = None
        self._read = self._write = -1

    @property
    def asked(self) -> int:
        """The number of the signal that asks for an end; 0 where none did."""
        return self._asked

    @property
    def late(self) -> int:
        """The number of the first signal that no step boundary was left for; 0 where none came."""
        return self._late

    @property
    def waited(self) -> float:
        """Seconds since the signal."""
        return time.monotonic() - self._since if self._asked else 0.0

    def install(self) -> None:
        """Hear signals from here on. For a process that is a rank, from its main thread."""
        if self._write >= 0:
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*STOPPING, AT_ONCE):
            # What was ignored from outside stays ignored, as with nohup. Not so the launcher's own word: a shell has
            # its background jobs ignore that too.
            if number == AT_ONCE or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _heard)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._launcher = end_with_launcher()

    def begin(self, grace_seconds: float) -> None:
        """Steps are taken from here on: a first signal waits for a boundary, that long.

        Args:
            grace_seconds: From the signal to the end of the checkpoint.
        """
        self._grace = grace_seconds

    def end(self) -> None:
        """All is done and saved: a signal, one of a moment ago too, has nothing left to ask for and is only noted."""
        self._ended, self._late = True, self._late or self._asked

    def ignore(self) -> None:
        """This process is leaving by itself, with what it was to say said; from its main thread.

        Python gives signals back their own effect while it takes itself down, which may take a while.
        """
        for number in STOPPING:
            if signal.getsignal(number) is _heard:
                signal.signal(number, signal.SIG_IGN)

    def on_leaving(self, tell: Callable[[int, str], None]) -> None:
        """Have somebody told of the exit code and the reason, before this process leaves at once."""
        self._told.append(tell)

    def leave(self, code: int, reason: str, *, stacks: bool = False, say: bool = True) -> None:
        """End this process now, from any thread.

        Args:
            code: What it ends with.
            reason: Why, for the reader.
            stacks: Print what each thread was doing.
            say: Print the reason.
        """
        for tell in self._told:
            with contextlib.suppress(Exception):
                tell(code, reason)
        if stacks:
            _say(stacks_of_threads())
        # Mostly every rank of a node has heard the same signal; its first one says it.
        if say and os.environ.get("LOCAL_RANK", "0") != "0" and code == AGAIN:
            time.sleep(ONE_REQUEST_SECONDS)
        if say:
            _say(f"{'stopped' if code == AGAIN else 'error'}: {reason}\n")
        os._exit(code)

    def _listen(self) -> None:
        while True:
            wait = None
            if self._asked and self._grace is not None and not self._ended:
                wait = max(0.0, self._since + self._grace - time.monotonic())
            try:
                ready, _, _ = select.select([self._read], [], [], wait)
            except OSError:
                return
            if not ready:
                self.leave(
                    128 + self._asked,
                    f"no checkpoint could be saved within {self._grace:g} s of {signal_name(self._asked)} "
                    "(health.grace_seconds); the steps since the last one are lost.",
                    stacks=True,
                )
            for number in os.read(self._read, 64):
                self._hear(number)

    def _hear(self, number: int) -> None:
        if number not in (*STOPPING, AT_ONCE):
            return
        if self._ended:
            self._late = self._late or number
            return
        name, now = signal_name(number), time.monotonic()
        if number == AT_ONCE:
            # The launcher's word to what is left when another rank has failed.
            self.leave(128 + number, self._why_at_once(name), say=False)
        elif not self._asked:
            if self._grace is None:
                self.leave(
                    AGAIN, f"{name} before the first step; nothing was lost.\n  do:       start it again"
                )
            self._since, self._asked = now, number
        elif now - self._since >= ONE_REQUEST_SECONDS:
            first = signal_name(self._asked)
            self.leave(128 + number, f"ended at once by {name}, {now - self._since:.0f} s after {first}.")

    def _why_at_once(self, name: str) -> str:
        if self._launcher is not None and _has_ended(self._launcher):
            return (
                "the launcher that started this rank has died: it was killed, by hand or for want of memory."
            )
        return f"{name}: the launcher ended what was left of the run."

    def _forget(self) -> None:
        """In a forked process, which is no rank."""
        signal.set_wakeup_fd(-1)
        for number in (*STOPPING, AT_ONCE):
            if signal.getsignal(number) is _heard:
                signal.signal(number, signal.SIG_DFL)
        self._write = -1


def end_with_launcher() -> int | None:
    """Have the kernel end this rank when the launcher that started it dies, however it dies.

    A launcher that is killed outright can end nobody. Its ranks would train on, hold the run's lock, and lose what
    they save next, since the store that they meet in is the launcher's.

    Returns:
        The launcher's process number; None where nobody would start this rank again.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None  # a rank by itself, or under another launcher
    launcher = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(AT_ONCE), 0, 0, 0)
    if os.getppid() != launcher:
        os.kill(os.getpid(), AT_ONCE)  # it died before the kernel was told
    return launcher


def _has_ended(process: int) -> bool:
    """Whether a process has ended, also where threads of it have not yet, or nobody has asked for its code."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def signal_name(number: int) -> str:
    """`SIGTERM` for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def stacks_of_threads() -> str:
    """What each thread of this process is doing in Python, the main thread first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident or -1)
        if frame is not None and thread is not threading.current_thread():
            parts.append(f"Thread {thread.name}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def _heard(number: int, frame: object) -> None:
    """Replaces what the signal would have done; the thread does the rest."""


def _say(text: str) -> None:
    # Not through sys.stderr, whose lock another thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


WATCH = SignalWatch()
