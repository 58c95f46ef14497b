"""The loader: this rank's samples, read ahead of the steps that use them."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np

from megatron_davinci.data.batches import Batch, Batches
from megatron_davinci.data.slots import OnSlot, RowShape, Slot, memory_file
from megatron_davinci.data.workers import Job, Lane, Setup, ThreadLane, end, start_processes
from megatron_davinci.errors import DavinciError


class Loader(Protocol):
    """Gives samples by their numbers. Close it when done."""

    def request(self, ns: np.ndarray) -> None:
        """Begin to read samples in the background. Requests are taken in their order.

        Args:
            ns: [n] integers.
        """

    def take(self, ns: np.ndarray) -> Batch:
        """The samples `ns`: the oldest request if it is just these, and read now if not, without any request left.

        What was read ahead is not used once a later record of the journal governs any of it.

        Args:
            ns: [n] integers.

        Returns:
            Its arrays hold until the next call.

        Raises:
            DataError: As `Batches.read`, of these samples, whoever read them. The requests behind them stand.
            EnvironmentProblem: As `Batches.read`; or whoever reads has ended.
        """

    def discard(self) -> None:
        """Forget what was requested."""

    def close(self) -> None:
        """Forget what was requested and end whoever reads, in bounded time."""


class _Request:
    """Samples that are being read.

    Attributes:
        ns: The samples.
        records: How many records decided what they are.
        slot: Where they are read to; None if it did not come to that.
        waits_for: Numbers of the lanes that have not answered yet.
        errors: What went wrong, by lane.
        is_wanted: Whether they may still be taken, or are held by who took them.
    """

    def __init__(self, ns: np.ndarray, records: int) -> None:
        self.ns, self.records = ns, records
        self.slot: int | None = None
        self.source = np.empty(0, np.int32)
        self.waits_for: set[int] = set()
        self.errors: dict[int, Exception] = {}
        self.is_wanted = True


class NativeLoader:
    """A `Loader` of threads or processes.

    Which sample is what is decided here, in the trainer: readers are told sources and windows. They write into slots,
    of which there are two more than `prefetch_steps`: one is in the caller's hands and one is for what nobody asked
    for ahead. A slot is used again only after everyone who was to write to it has answered.

    Args:
        batches: The curriculum and its sources.
        workers: Processes that read; with 0, threads of this one do.
        read_threads: Threads that read; with workers, in each.
        prefetch_steps: Requests that may be outstanding.
        on_slot: Learns of the memory that batches lie in, so that it can be pinned.

    Raises:
        EnvironmentProblem: Workers cannot be started.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        workers: int = 0,
        read_threads: int = 2,
        prefetch_steps: int = 1,
        on_slot: OnSlot | None = None,
    ) -> None:
        self._curriculum = batches.curriculum
        shape = RowShape(batches.sequence_length, batches.dtype.name, batches.has_mask)
        self._prefetch_steps = prefetch_steps
        self._slots: list[Slot] = []
        self._lanes: list[Lane] = []
        self._queue: deque[_Request] = deque()
        self._held: _Request | None = None
        self._unanswered: dict[int, _Request] = {}
        self._users: list[_Request | None] = [None] * (prefetch_steps + 2)
        self._number = 0
        try:
            for _ in self._users:
                self._slots.append(Slot(shape, memory_file() if workers else None, on_slot))
            if workers:
                fds = [slot.fd for slot in self._slots if slot.fd is not None]
                self._lanes += start_processes(workers, Setup(batches.sources, shape, fds, read_threads))
            else:
                self._lanes += [ThreadLane(batches.sources, self._slots, n) for n in range(read_threads)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NativeLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, ns: np.ndarray) -> None:
        """As `Loader.request`.

        Raises:
            ValueError: `prefetch_steps` requests are outstanding already.
            EnvironmentProblem: A worker has ended.
        """
        if len(self._queue) >= self._prefetch_steps:
            raise ValueError(f"{len(self._queue)} requests are outstanding: take or discard one first")
        self._queue.append(self._begin(ns))

    def take(self, ns: np.ndarray) -> Batch:
        """As `Loader.take`."""
        self._let_go(self._held)
        self._held = None
        if self._queue and self._is_current(self._queue[0], ns):
            taken = self._queue.popleft()
        else:
            self.discard()
            taken = self._begin(ns)
        self._held = taken
        self._wait_for(taken)
        if taken.errors:
            raise taken.errors[min(taken.errors)]
        assert taken.slot is not None
        slot, count = self._slots[taken.slot], len(taken.ns)
        return Batch(slot.tokens[:count], taken.source, None if slot.mask is None else slot.mask[:count])

    def discard(self) -> None:
        """As `Loader.discard`."""
        while self._queue:
            self._let_go(self._queue.popleft())

    def close(self) -> None:
        """As `Loader.close`."""
        self.discard()
        lanes, self._lanes = self._lanes, []
        end(lanes)
        slots, self._slots = self._slots, []
        for slot in slots:
            slot.close()

    def _is_current(self, request: _Request, ns: np.ndarray) -> bool:
        since = self._curriculum.first_samples[request.records :]
        is_stale = len(since) > 0 and len(request.ns) > 0 and since[0] <= request.ns.max()
        return not is_stale and np.array_equal(request.ns, ns)

    def _begin(self, ns: np.ndarray) -> _Request:
        if not self._lanes:
            raise RuntimeError("the loader is closed")
        request = _Request(np.array(ns, np.int64), len(self._curriculum.first_samples))
        try:
            located = self._curriculum.locate_many(request.ns)
        except DavinciError as error:
            request.errors[0] = error
            return request
        number, count = self._free_slot(), len(request.ns)
        slot = self._slots[number]
        slot.grow(count)
        slot.plan[0, :count], slot.plan[1, :count] = located.source, located.window
        request.slot, request.source = number, located.source.astype(np.int32)
        self._users[number] = request
        self._number += 1
        lanes = len(self._lanes)
        for lane in range(lanes):
            first, last = count * lane // lanes, count * (lane + 1) // lanes
            if first < last:
                request.waits_for.add(lane)
                self._unanswered[self._number] = request
                self._lanes[lane].send(Job(self._number, number, slot.capacity, first, last))
        return request

    def _free_slot(self) -> int:
        for number, user in enumerate(self._users):
            if user is None:
                return number
        # As many are left over as requests were discarded; their readers are not done yet.
        number = next(n for n, user in enumerate(self._users) if user is not None and not user.is_wanted)
        unwanted = self._users[number]
        assert unwanted is not None
        self._wait_for(unwanted)
        return number

    def _wait_for(self, request: _Request) -> None:
        while request.waits_for:
            lane = min(request.waits_for)
            number, error = self._lanes[lane].receive()
            answered = self._unanswered[number]
            answered.waits_for.remove(lane)
            if error is not None:
                answered.errors[lane] = error
            if not answered.waits_for:
                del self._unanswered[number]
                if not answered.is_wanted:
                    self._let_go(answered)

    def _let_go(self, request: _Request | None) -> None:
        if request is None:
            return
        request.is_wanted = False
        if request.slot is not None and not request.waits_for:
            self._users[request.slot] = None
            request.slot = None
