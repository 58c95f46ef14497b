"""Moments of a rank's work: the host's clock on a CPU, events in the stream on CUDA, and names for profilers."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from megatron_davinci.platform.device import Platform


class Stopwatch(Protocol):
    """Takes moments and says the time between them.

    Attributes:
        lag: Steps after which a moment can be asked for without waiting for it.
    """

    lag: int

    def mark(self) -> Any:
        """Take the present moment; None where there can be none now."""
        ...

    def wait(self, moment: Any) -> None:
        """Wait until the work before a moment is done."""
        ...

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another, both waited for."""
        ...

    def release(self, moments: list[Any]) -> None:
        """Give back moments that nobody will ask for again."""
        ...

    def push(self, name: str) -> None:
        """Begin a range that profilers see."""
        ...

    def pop(self) -> None:
        """End the range that began last."""
        ...


class HostStopwatch:
    """The host's monotonic clock: on a CPU the work is done when the call returns."""

    lag = 0

    def mark(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def wait(self, moment: float) -> None:
        """Nothing is left to wait for."""

    def between(self, begin: float, end: float) -> float:
        """See `Stopwatch.between`."""
        return end - begin

    def release(self, moments: list[float]) -> None:
        """Numbers need no keeping."""

    def push(self, name: str) -> None:
        """NVTX is CUDA's."""

    def pop(self) -> None:
        """See `push`."""


class StreamStopwatch:
    """Events in the current CUDA stream, and NVTX ranges.

    The host runs ahead of the device, so its clock would say how long launching takes. An event is a mark between
    kernels that costs the device nothing to pass; the time between two is the device's, its idleness with it. They
    are asked for a step later, when the host has read the next loss, and nothing is waited for that was not before.
    """

    lag = 1

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event | None:
        """Record an event; None while the stream is captured into a graph, which would capture the event too."""
        if torch.cuda.is_current_stream_capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, moment: torch.cuda.Event) -> None:
        """Wait until the device has passed the event."""
        moment.synchronize()

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Stopwatch.between`."""
        return float(begin.elapsed_time(end)) / 1000.0

    def release(self, moments: list[torch.cuda.Event]) -> None:
        """Events are used again."""
        self._free += moments

    def push(self, name: str) -> None:
        """Begin an NVTX range."""
        torch.cuda.nvtx.range_push(name)

    def pop(self) -> None:
        """End the NVTX range that began last."""
        torch.cuda.nvtx.range_pop()


def stopwatch(platform: Platform) -> Stopwatch:
    """What takes time on this platform."""
    return StreamStopwatch() if platform.name == "cuda" else HostStopwatch()
