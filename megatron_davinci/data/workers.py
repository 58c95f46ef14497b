"""Whoever reads for the trainer: threads of its own, or processes. Both do the same work on the same slots.

A process is a fresh interpreter (never a fork: the trainer has threads and perhaps a CUDA context) which imports no
torch. It gets the sources once, then jobs of a few integers; what it reads lies in the slots' memory files, whose
descriptors it inherits. It ends when its connection does, so that it survives no trainer, however that one ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

from megatron_davinci.data.reader import Reading, Rows, WindowReader
from megatron_davinci.data.slots import RowShape, Slot
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DavinciError, EnvironmentProblem

_PARENT_CHECK_SECONDS = 5
_PATIENCE_SECONDS = 5.0
_MOST_FILES = 1 << 16
_ENDED = -1  # stands for a request's number when a thread answers no more
_NOT_OURS = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
}  # the trainer's; it ends us by the pipe
_MAIN = "from megatron_davinci.data.workers import main; main()"


class Job(NamedTuple):
    """Rows `first` to `end` of a slot, for one reader.

    Attributes:
        number: Of the request that it is a part of.
        slot: Number of the slot.
        capacity: The slot's, which may have grown.
        first: First row.
        end: After the last row.
    """

    number: int
    slot: int
    capacity: int
    first: int
    end: int


_JOB = struct.Struct("<5q")

Answer = tuple[int, Exception | None]
"""The request's number, and what went wrong."""


class Lane(Protocol):
    """One reader, from the trainer's side. It does its jobs in their order."""

    def send(self, job: Job) -> None:
        """Give it a job; returns at once."""

    def receive(self) -> Answer:
        """Wait for its next answer.

        Raises:
            EnvironmentProblem: It has ended without one.
        """

    def hang_up(self) -> None:
        """Tell it to end."""

    def join(self) -> None:
        """Wait, for a bounded time, until it has ended."""


class ThreadLane:
    """A reader in a thread of this process.

    Args:
        sources: By their numbers.
        slots: By their numbers.
        number: For the thread's name.
    """

    def __init__(self, sources: Sequence[Source], slots: Sequence[Slot], number: int) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._ends = False
        reader = WindowReader(sources)
        # A daemon: storage that hangs must not keep a program from ending.
        self._thread = Thread(target=self._run, args=(reader, slots), name=f"data-{number}", daemon=True)
        self._thread.start()

    def send(self, job: Job) -> None:
        """As `Lane.send`."""
        self._jobs.put(job)

    def receive(self) -> Answer:
        """As `Lane.receive`."""
        number, error = answer = self._answers.get()
        if number == _ENDED and error is not None:
            self._answers.put(answer)  # whoever asks again is told again
            raise error
        return answer

    def hang_up(self) -> None:
        """As `Lane.hang_up`."""
        self._ends = True
        self._jobs.put(None)

    def join(self) -> None:
        """As `Lane.join`."""
        self._thread.join(10)

    def _run(self, reader: WindowReader, slots: Sequence[Slot]) -> None:
        try:
            serve(reader, slots, self._next, lambda number, error: self._answers.put((number, error)))
        except Exception as error:
            self._answers.put((_ENDED, error))

    def _next(self, wait: bool) -> Job | None:
        try:
            job = self._jobs.get(wait)
        except Empty:
            return None
        if job is None or self._ends:
            raise EOFError
        return job


class ProcessLane:
    """A reader in a process of its own.

    Args:
        number: Of the worker, for messages.
        fds: Of the slots' memory files.

    Raises:
        EnvironmentProblem: It cannot be started.
    """

    def __init__(self, number: int, fds: Sequence[int]) -> None:
        self._number = number
        self._connection, theirs = Pipe()
        self._problem: EnvironmentProblem | None = None
        paths = [path or os.getcwd() for path in sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs, _interrupts_held():
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno()), str(os.getpid())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *fds),
                )
            except OSError as error:
                self._connection.close()
                raise EnvironmentProblem(
                    "A data worker cannot be started.",
                    where=f"data worker {number}",
                    found=error.strerror,
                    do="lower data.loader.workers; with 0, threads of the trainer read",
                ) from error

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def begin(self, what: bytes) -> None:
        """Send what it works with: a `Setup`, pickled."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(what)

    def send(self, job: Job) -> None:
        """As `Lane.send`. That a worker has ended is said when its answer is waited for."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(_JOB.pack(*job))

    def receive(self) -> Answer:
        """As `Lane.receive`."""
        if self._problem is not None:
            raise self._problem
        try:
            answer: Answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._problem = self._how_it_ended()
            raise self._problem from error
        return answer

    def hang_up(self) -> None:
        """As `Lane.hang_up`."""
        self._connection.close()

    def join(self) -> None:
        """As `Lane.join`. It has nothing to lose, so one that does not end by itself is ended."""
        for end in (None, self._process.kill):
            if end is not None:
                end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_SECONDS)
                return

    def _how_it_ended(self) -> EnvironmentProblem:
        try:
            code = self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            found = "no answer, and its connection closed"
        else:
            found = f"exit code {code}"
            if code < 0:
                found = f"ended by signal {-code} ({signal.strsignal(-code)})"
        return EnvironmentProblem(
            "A data worker ended while it was needed.",
            where=f"data worker {self._number}, process {self.pid}",
            found=found,
            do="the kernel's log says if memory ran out (dmesg): then lower data.loader.prefetch_steps or workers; "
            "start the same command again",
        )


class Setup(NamedTuple):
    """What a worker process is told once.

    Attributes:
        sources: By their numbers.
        shape: What a row holds.
        fds: Of the slots' memory files, by the slots' numbers.
        read_threads: Threads that wait for storage at the same time.
    """

    sources: list[Source]
    shape: RowShape
    fds: list[int]
    read_threads: int


def start_processes(workers: int, setup: Setup) -> list[ProcessLane]:
    """Start worker processes; they are not waited for.

    Raises:
        EnvironmentProblem: One cannot be started.
    """
    lanes: list[ProcessLane] = []
    try:
        for number in range(workers):
            lanes.append(ProcessLane(number, setup.fds))
    except BaseException:
        end(lanes)
        raise
    what = bytes(ForkingPickler.dumps(setup))
    for lane in lanes:
        lane.begin(what)
    return lanes


def end(lanes: Sequence[Lane]) -> None:
    """End readers, in bounded time."""
    for lane in lanes:
        lane.hang_up()
    for lane in lanes:
        lane.join()


def serve(
    reader: WindowReader,
    slots: Sequence[Slot],
    next_job: Callable[[bool], Job | None],
    answer: Callable[[int, Exception | None], None],
) -> None:
    """Do jobs until `next_job` raises `EOFError`.

    Args:
        reader: Reads.
        slots: By their numbers.
        next_job: Gives the next job; None if there is none yet and it is not to wait.
        answer: Is told of each job that is done.
    """
    begun: deque[tuple[int, Reading]] = deque()
    try:
        while True:
            # Every job is begun before the oldest is waited for: so storage hears of the next batches early.
            job = next_job(not begun)
            if job is not None:
                begun.append((job.number, reader.begin(_rows(slots[job.slot], job))))
            if begun and (job is None or begun[0][1].is_complete):
                number, reading = begun.popleft()
                answer(number, _problem_of(reading))
    except EOFError:
        pass
    finally:
        reader.close()


def main() -> None:
    """A worker process. Its arguments: its connection's descriptor, its parent's process id."""
    # Ctrl-C of a terminal and a launcher's signals go to all; what follows from them is the trainer's to decide.
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _allow_many_files()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        setup: Setup = connection.recv()
        slots = [Slot(setup.shape, fd) for fd in setup.fds]
        reader = WindowReader(setup.sources, setup.read_threads)
        inbox = _Inbox(connection, parent)
        serve(reader, slots, inbox.next, lambda number, error: _say(connection, number, error))


class _Inbox:
    """Jobs from the trainer. Ends with the connection, or with the trainer where another process holds its end."""

    def __init__(self, connection: Connection, parent: int) -> None:
        self._connection, self._parent = connection, parent
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)

    def next(self, wait: bool) -> Job | None:
        while not self._poll.poll(_PARENT_CHECK_SECONDS * 1000 if wait else 0):
            if os.getppid() != self._parent:
                raise EOFError
            if not wait:
                return None
        return Job(*_JOB.unpack(self._connection.recv_bytes()))


def _rows(slot: Slot, job: Job) -> Rows:
    slot.map(job.capacity)
    part = slice(job.first, job.end)
    mask = None if slot.mask is None else slot.mask[part]
    return Rows(slot.plan[0, part], slot.plan[1, part], slot.tokens[part], slot.rows[part], mask)


def _problem_of(reading: Reading) -> Exception | None:
    try:
        reading.finish()
    except DavinciError as error:
        return error
    except Exception:
        return RuntimeError(f"a data reader failed:\n{traceback.format_exc()}")
    return None


def _say(connection: Connection, number: int, error: Exception | None) -> None:
    try:
        said: Any = ForkingPickler.dumps((number, error))
    except Exception:
        # What an error carries may be anything; its words always go.
        kind = type(error) if isinstance(error, DavinciError) else RuntimeError
        said = ForkingPickler.dumps((number, kind(str(error))))
    connection.send_bytes(said)


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _interrupts_held() -> Any:
    """Hold signals back, also from a process that is started here until it ignores them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
