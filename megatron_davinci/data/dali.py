"""NVIDIA DALI as the loader: its processes read, its pipeline carries, and sample numbers prove what arrives.

DALI asks its source for iteration `k` and nothing else. Which samples that is follows from `k` alone: micro-batch
`k` of a data-parallel rank begins `k * ranks * size` samples after the rank's first. It does not hang on the global
batch, so a batch ramp changes nothing; a resume, a skip or a new mixture starts the pipeline anew where it is wanted.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import Future
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from megatron_davinci import errors
from megatron_davinci.data.batches import Batch, Batches
from megatron_davinci.errors import DavinciError, EnvironmentProblem

_LONGEST_AHEAD = 256  # micro-batches; each has a piece of shared memory to itself
_POLL_SECONDS = 0.5  # between looks at whether DALI's processes are there
_GRACE_SECONDS = 3.0  # for a process that was told to end


class MicroBatches:
    """The source that DALI calls, in its processes or in this one: micro-batch `k` from its number.

    What goes wrong in it is part of what it returns: DALI would make text of an exception.

    Args:
        batches: Reads samples by number.
        first_sample: The first sample of micro-batch 0.
        size: Sequences a micro-batch.
        stride: Samples from one micro-batch of this rank to its next.
    """

    def __init__(self, batches: Batches, first_sample: int, size: int, stride: int) -> None:
        self._batches, self._first, self.size, self._stride = batches, first_sample, size, stride

    def samples(self, k: int) -> np.ndarray:
        """The sample numbers of micro-batch `k`: [size] int64."""
        return self._first + k * self._stride + np.arange(self.size, dtype=np.int64)

    def __call__(self, k: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Read micro-batch `k`.

        Returns:
            tokens: [size, sequence_length + 1] of `Batches.dtype`.
            identity: [size, 2] int64, each sample's number and source.
            loss mask: a row a sample, [sequence_length] uint8, or [0] without masks.
            problem: a row a sample, uint8; empty, or the error's JSON in the first.
        """
        numbers = self.samples(k)
        nothing = [np.empty(0, np.uint8)] * self.size
        try:
            batch = self._batches.read(numbers)
        except DavinciError as error:
            # Zeros that no one sees: the problem is looked at before the tokens are.
            zeros = np.zeros((self.size, self._batches.sequence_length + 1), self._batches.dtype)
            problem = np.frombuffer(_said(error), np.uint8)
            return zeros, np.stack([numbers, np.zeros_like(numbers)], 1), nothing, [problem, *nothing[1:]]
        identity = np.stack([numbers, batch.source.astype(np.int64)], 1)
        return batch.tokens, identity, nothing if batch.loss_mask is None else [*batch.loss_mask], nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_worker, (self._batches, self._first, self.size, self._stride)


class DaliLoader:
    """Samples by number, read ahead by a DALI pipeline. Close it when done.

    Args:
        batches: Reads samples by number.
        micro_batch_size: Sequences a micro-batch.
        data_ranks: Data-parallel ranks.
        workers: Processes that read; 0 reads in this one, when DALI asks for more.
        prefetch_steps: Requests that the processes read ahead, of the size of the one that they begin with.
        device: Ordinal of the CUDA device that tokens are put on; None leaves them in memory.

    Raises:
        EnvironmentProblem: DALI is not installed, or this process may not start others.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        micro_batch_size: int,
        data_ranks: int,
        workers: int,
        prefetch_steps: int,
        device: int | None = None,
    ) -> None:
        _dali()
        if workers and multiprocessing.current_process().daemon:
            raise EnvironmentProblem(
                "DALI's processes cannot be started from here.",
                found="a daemonic process, which may have no children",
                do="start the ranks by `davinci train` or torchrun, or set data.loader.workers to 0",
            )
        self._batches = batches
        self._size, self._stride = micro_batch_size, micro_batch_size * data_ranks
        self._workers, self._device = workers, device
        self._prefetch_steps = prefetch_steps
        self._running: _Pipeline | None = None

    def request(self, ns: np.ndarray) -> None:
        """Begin to read at `ns`, if nothing is being read yet; the pipeline goes on from there by itself.

        Args:
            ns: [n] integers, as `take`.

        Raises:
            EnvironmentProblem: DALI's processes do not start.
        """
        if self._running is None and len(ns):
            self._start(int(ns[0]), len(ns))

    def take(self, ns: np.ndarray) -> Batch:
        """The samples `ns`.

        A micro-batch of samples that do not follow each other, as where a skip begins, is read in this process.

        Args:
            ns: [n] integers: this rank's micro-batches, one after the other.

        Returns:
            The batch, the caller's own. With a device, `tokens` is `DevicePieces`.

        Raises:
            ValueError: `ns` is not made of whole micro-batches.
            DataError: As `Batches.read`, in whichever process it came up.
            EnvironmentProblem: As `Batches.read`; or a process of DALI's ended.
        """
        chunks = np.asarray(ns, np.int64).reshape(-1, self._size)
        shape, width = chunks.shape, self._batches.sequence_length
        source = np.empty(shape, np.int32)
        loss_mask = np.empty((*shape, width), np.uint8) if self._batches.has_mask else None
        rows = np.empty((*shape, width + 1), self._batches.dtype)
        on_device = []
        for i, chunk in enumerate(chunks):
            # Copied at once: DALI's processes write over this memory once they are a few micro-batches further.
            piece = self._piece(chunk, len(ns))
            source[i] = piece.identity[:, 1]
            if loss_mask is not None:
                loss_mask[i] = piece.loss_mask
            if self._device is None:
                rows[i] = piece.tokens
            else:
                on_device.append(piece.tokens)
            if self._running is not None:
                self._running.begin()
        tokens: Any = (
            DevicePieces(tuple(on_device)) if self._device is not None else rows.reshape(-1, width + 1)
        )
        return Batch(tokens, source.reshape(-1), None if loss_mask is None else loss_mask.reshape(-1, width))

    def discard(self) -> None:
        """Drop all that was read ahead, and end DALI's processes."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def close(self) -> None:
        """End DALI's processes."""
        self.discard()

    def _piece(self, numbers: np.ndarray, at_once: int) -> _Piece:
        if (np.diff(numbers) != 1).any():
            read = self._batches.read(numbers)
            loss_mask = np.empty((self._size, 0), np.uint8) if read.loss_mask is None else read.loss_mask
            return _Piece(read.tokens, np.stack([numbers, read.source], 1), loss_mask, b"")
        for _ in range(2):
            running = self._running
            if running is None or not running.has_next(numbers):
                running = self._start(int(numbers[0]), at_once)
            try:
                piece = running.next()
            except BaseException:
                self.discard()
                raise
            if np.array_equal(piece.identity[:, 0], numbers):
                if piece.problem:
                    raise _heard(piece.problem)
                return piece
            self.discard()
        raise EnvironmentProblem(
            "DALI gave other samples than it was asked for.",
            found=f"samples {piece.identity[:, 0].tolist()}",
            expected=f"samples {numbers.tolist()}",
            do="set data.loader.kind to native, and report this with the version of DALI",
        )

    def _start(self, first_sample: int, at_once: int) -> _Pipeline:
        self.discard()
        source = MicroBatches(self._batches, first_sample, self._size, self._stride)
        ahead = max(self._prefetch_steps * (at_once // self._size), 2 * self._workers)
        self._running = _Pipeline(
            source, self._batches, self._workers, min(ahead, _LONGEST_AHEAD), self._device
        )
        return self._running


class DevicePieces(NamedTuple):
    """Tokens on a CUDA device, as DALI left them there.

    Attributes:
        pieces: A micro-batch each, [size, sequence_length + 1] of `Batches.dtype`, as objects that speak DLPack: of
            DALI's, which wait for its stream when they are taken over, or arrays in memory that are not there yet.
    """

    pieces: tuple[Any, ...]


def end(process: BaseProcess, seconds: float) -> None:
    """Wait for a child process, kill it if it takes longer, and see that it is known to have ended.

    A thread of DALI's waits for it too: of two, the one that comes second hears of no such child, perhaps before the
    first has noted how it ended, and takes it for alive.

    Args:
        process: The child.
        seconds: How long it may take by itself.
    """
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    until = time.monotonic() + _GRACE_SECONDS
    while process.is_alive() and time.monotonic() < until:
        time.sleep(0.001)


class _Piece(NamedTuple):
    """One micro-batch as it came out of the pipeline; in memory, `tokens` holds only until the next."""

    tokens: Any
    identity: np.ndarray
    loss_mask: np.ndarray  # [size, 0] where there is none, or where there is a problem
    problem: bytes


class _Pipeline:
    """A DALI pipeline from one sample on, and the processes that it started."""

    def __init__(
        self, source: MicroBatches, batches: Batches, workers: int, ahead: int, device: int | None
    ) -> None:
        self._source, self._curriculum, self._device = source, batches.curriculum, device
        # The processes have the records that there are now, and never learn of one that is appended later.
        self._records = len(self._curriculum.first_samples)
        self._k = 0
        dali = _dali()
        kinds = {"uint16": dali.types.UINT16, "int32": dali.types.INT32, "int64": dali.types.INT64}
        if workers:
            _start_quiet_tracker()
        before = set(multiprocessing.active_children())
        pipeline = dali.Pipeline(
            batch_size=source.size,
            num_threads=1,
            device_id=device,
            prefetch_queue_depth=2,
            py_num_workers=max(1, workers),
            py_start_method="spawn",
        )
        parallel = {"parallel": True, "prefetch_queue_depth": ahead} if workers else {}
        with pipeline:
            tokens, identity, loss_mask, problem = dali.fn.external_source(
                source=source,
                num_outputs=4,
                batch=True,
                dtype=[kinds[batches.dtype.name], dali.types.INT64, dali.types.UINT8, dali.types.UINT8],
                ndim=[1, 1, 1, 1],
                **parallel,
            )
            on_device = tokens if device is None else tokens.gpu()
            pipeline.set_outputs(on_device, identity, loss_mask, problem)
        self._pipeline: Any = pipeline
        self._processes: list[BaseProcess] = []
        try:
            pipeline.build()
        except RuntimeError as error:
            raise EnvironmentProblem("DALI's pipeline does not start.", found=error) from error
        finally:
            self._processes = [p for p in multiprocessing.active_children() if p not in before]
        self._asked: SimpleQueue[Future[Any] | None] = SimpleQueue()
        self._thread = Thread(target=self._serve, name="dali", daemon=True)
        self._thread.start()
        self._begun: Future[Any] | None = None
        self.begin()

    def has_next(self, numbers: np.ndarray) -> bool:
        """Whether the next micro-batch is these samples, by the records of now."""
        since = self._curriculum.first_samples[self._records :]
        is_stale = len(since) > 0 and since[0] <= numbers[-1]
        return not is_stale and np.array_equal(self._source.samples(self._k), numbers)

    def begin(self) -> None:
        """Have DALI make the next micro-batch, and its processes those that follow; what the last gave is over."""
        if self._begun is None and not self._ended():
            self._begun = Future()
            self._asked.put(self._begun)

    def next(self) -> _Piece:
        """The next micro-batch.

        Raises:
            EnvironmentProblem: A process ended.
        """
        tokens, identity, loss_mask, problem = self._outputs()
        self._k += 1
        dense = tokens.as_tensor()
        return _Piece(
            np.asarray(dense) if self._device is None else dense,
            np.array(identity.as_tensor()),
            np.array(loss_mask.as_tensor()),
            np.asarray(problem.at(0)).tobytes(),
        )

    def close(self) -> None:
        """End the processes, and the pipeline with them."""
        self._asked.put(None)
        if not self._ended():
            self._thread.join(_GRACE_SECONDS)
        self._pipeline = None
        gc.collect()  # the last reference to the pipeline ends its processes, if all of them are there
        until = time.monotonic() + (0 if self._ended() else _GRACE_SECONDS)
        for process in self._processes:
            end(process, max(0, until - time.monotonic()))

    def _outputs(self) -> Any:
        self.begin()
        asked, self._begun = self._begun or Future(), None
        try:
            while not self._ended():
                try:
                    return asked.result(_POLL_SECONDS)
                except TimeoutError:
                    continue
            return asked.result(0)
        except (RuntimeError, TimeoutError) as error:
            if not (ended := self._ended()):
                raise
            raise EnvironmentProblem(
                "A process of DALI's ended while it was reading.",
                found=ended,
                do="look for what ended it (the kernel's log says if memory ran out); start the same command again",
            ) from error

    def _serve(self) -> None:
        # Beside the caller's thread: a lock that a killed process shared with DALI is never given back.
        while (asked := self._asked.get()) is not None:
            try:
                asked.set_result(self._pipeline.run())
            except BaseException as error:
                asked.set_exception(error)

    def _ended(self) -> str:
        # DALI ends the others once one has ended; the one that it did not end tells most.
        ends = [(p.pid, p.exitcode) for p in self._processes if p.exitcode is not None]
        ends.sort(key=lambda end: end[1] == -signal.SIGTERM)
        if not ends:
            return ""
        pid, code = ends[0]
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"process {pid}, ended by {by}"


def _start_quiet_tracker() -> None:
    # Python's tracker frees the semaphores of a rank that was ended, and would tell the user of it as of a leak.
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker"]))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _in_worker(batches: Batches, first_sample: int, size: int, stride: int) -> MicroBatches:
    """Make the source in a process of DALI's, which ends with its parent and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    return MicroBatches(batches, first_sample, size, stride)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _said(error: DavinciError) -> bytes:
    known = {"where": error.where, "found": error.found, "expected": error.expected, "do": error.do}
    known = {name: value if value is None else str(value) for name, value in known.items()}
    return json.dumps({"kind": type(error).__name__, "what": error.what, **known}).encode()


def _heard(said: bytes) -> DavinciError:
    fields = json.loads(said)
    kind: type[DavinciError] = getattr(errors, fields.pop("kind"))
    return kind(fields.pop("what"), **fields)


def _dali() -> Any:
    """DALI's modules.

    Raises:
        EnvironmentProblem: DALI, or a package that it needs, is not installed.
    """
    try:
        from nvidia import dali
        from nvidia.dali import fn, types  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "data.loader.kind: dali needs NVIDIA DALI.",
            found=error,
            do="install the extra: pip install 'megatron-davinci[dali]'; or set data.loader.kind to native",
        ) from error
    return dali
