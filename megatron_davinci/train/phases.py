"""Where a step's time goes: each moment of it belongs to one phase, or to none, which is the rest.

Megatron-Core's schedules, its gradient synchronisation and its optimizers say when they begin and end, to an object
that is in their configurations as `timers`. `PhaseTimers` is that object. What is inside another phase is taken out
of it, so that phases add up to the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatron_davinci.platform.stopwatch import Stopwatch

PHASES = (
    "data",
    "forward",
    "backward",
    "pipeline",
    "gradient_sync",
    "optimizer",
    "parameter_gather",
    "other",
    "evaluation",
    "checkpoint",
)
"""In a step's order; `other` is what no phase claims, and the last two lie between steps."""
BETWEEN_STEPS = ("evaluation", "checkpoint")
_OTHER = PHASES.index("other")

# Of Megatron-Core's names; those that are not here stay with what is around them.
_OF_MEGATRON = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "gradient_sync",
    "conditional-embedder-grads-all-reduce": "gradient_sync",
    "non-tensor-parallel-grads-all-reduce": "gradient_sync",
    "embedding-grads-all-reduce": "gradient_sync",
    "params-all-gather": "parameter_gather",
    "optimizer-copy-to-main-grad": "optimizer",
    "optimizer-unscale-and-check-inf": "optimizer",
    "optimizer-clip-main-grad": "optimizer",
    "optimizer-count-zeros": "optimizer",
    "optimizer-inner-step": "optimizer",
    "optimizer-copy-main-to-model-params": "optimizer",
}
_PIPELINE = ("forward-", "backward-")  # -send, -recv and all their combinations


def phase_of(name: str) -> str | None:
    """The phase of one of Megatron-Core's timers; None for those that are no phase of their own."""
    found = _OF_MEGATRON.get(name)
    if found is None and name.startswith(_PIPELINE) and name.endswith(("-send", "-recv")):
        return "pipeline"
    return found


class PhaseTimers:
    """Times the phases of steps.

    Args:
        stopwatch: Takes the moments; None switches all of it off.

    Attributes:
        annotate: Whether torch's profiler is to see the phases.
    """

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        self._watch = stopwatch
        self.annotate = False
        self._named: dict[str, _Phase] = {}
        self._phases = [_Phase(self, index, name in BETWEEN_STEPS) for index, name in enumerate(PHASES)]
        self._stack: list[int] = []
        self._ranges: list[Any] = []
        self._held = False
        self._current = _OTHER
        # (the phase that ends here, the moment), from the moment at which the step before ended.
        self._marks: list[tuple[int, Any]] = []
        self._ended: deque[list[tuple[int, Any]]] = deque()
        if stopwatch is not None:
            self.begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> PhaseTimers:
        # Megatron-Core copies configurations, a layer its own; a copy of the timers would time into nothing.
        return self

    @property
    def on(self) -> bool:
        """Whether anything is timed."""
        return self._watch is not None

    @property
    def current(self) -> str | None:
        """The present phase; None where nothing is timed."""
        return PHASES[self._current] if self.on else None

    def attach(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """Have Megatron-Core tell these timers what it does.

        Args:
            chunks: Model chunks, wrapped or not.
            optimizer: Its optimizer, or several chained.
        """
        if self._watch is None:
            return
        for chunk in chunks:
            chunk.config.timers = self
        for one in (optimizer, *getattr(optimizer, "chained_optimizers", ())):
            if getattr(one, "config", None) is not None:
                one.config.timers = self

    def __call__(self, name: str, log_level: int | None = None) -> _Phase | _Nothing:
        """The timer of one of Megatron-Core's names, with `start` and `stop`."""
        found = self._named.get(name)
        if found is None:
            phase = phase_of(name)
            if phase is None:
                return _NOTHING
            found = self._named[name] = self._phases[PHASES.index(phase)]
        return found

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """What is done in this context is in the phase; in one between steps, all that is inside counts as it."""
        return nullcontext() if self._watch is None else self._phases[PHASES.index(name)]

    def begin(self) -> None:
        """Time from here on: what came before belongs to no step."""
        if self._watch is not None:
            self._leave_all()
            self._marks = [(_OTHER, self._watch.mark())]

    def end_step(self) -> None:
        """The step ends here, and the next begins."""
        if self._watch is None:
            return
        mark = self._watch.mark()
        self._marks.append((self._current, mark))
        self._ended.append(self._marks)
        self._marks = [(_OTHER, mark)]
        self._leave_all()

    def finished(self, *, wait: bool = False) -> list[dict[str, float]]:
        """The phases of the steps that are through, each once and in their order: seconds by phase.

        Every phase that lies in steps is there, `evaluation` and `checkpoint` where they came before the step.

        Args:
            wait: Wait for the device, and leave none over.
        """
        found = []
        while self._watch is not None and len(self._ended) > (0 if wait else self._watch.lag):
            marks = self._ended.popleft()
            self._watch.wait(marks[-1][1])
            seconds = [0.0] * len(PHASES)
            since = marks[0][1]
            for index, moment in marks[1:]:
                seconds[index] += self._watch.between(since, moment)
                since = moment
            # The last moment is where the next step begins.
            self._watch.release([moment for _, moment in marks[:-1]])
            found.append(
                {
                    name: value
                    for name, value in zip(PHASES, seconds, strict=True)
                    if value or name not in BETWEEN_STEPS
                }
            )
        return found

    def enter(self, index: int, *, whole: bool = False) -> None:
        """Begin a phase inside the present one."""
        if self._held:
            return
        self._held = whole
        self._stack.append(index)
        self._switch(index)
        self._push(PHASES[index])

    def leave(self, index: int, *, whole: bool = False) -> None:
        """End the phase that was begun last; any other that is meant is taken out from under it."""
        if (self._held and not whole) or index not in self._stack:
            return
        self._held = False
        at = len(self._stack) - 1 - self._stack[::-1].index(index)
        del self._stack[at]
        self._pop()
        self._switch(self._stack[-1] if self._stack else _OTHER)

    def _leave_all(self) -> None:
        """End what nobody has ended: a step that is not applied leaves Megatron-Core's optimizer in its midst."""
        for _ in self._stack:
            self._pop()
        self._stack.clear()
        self._held, self._current = False, _OTHER

    def _switch(self, index: int) -> None:
        if index == self._current or self._watch is None:
            return
        mark = self._watch.mark()
        if mark is not None:
            self._marks.append((self._current, mark))
            self._current = index

    def _push(self, name: str) -> None:
        if self._watch is not None:
            self._watch.push(name)
        if self.annotate:
            seen = torch.profiler.record_function(name)
            seen.__enter__()
            self._ranges.append(seen)

    def _pop(self) -> None:
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        if self._watch is not None:
            self._watch.pop()


class _Phase:
    """Begins and ends one phase, for Megatron-Core by `start` and `stop` and for us as a context."""

    def __init__(self, timers: PhaseTimers, index: int, whole: bool) -> None:
        self._timers, self._index, self._whole = timers, index, whole

    def start(self, barrier: bool = False) -> None:
        """Begin. Megatron-Core would have ranks wait for each other here; what is timed should not be changed."""
        self._timers.enter(self._index, whole=self._whole)

    def stop(self, barrier: bool = False) -> None:
        """End."""
        self._timers.leave(self._index, whole=self._whole)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


class _Nothing:
    """A timer of Megatron-Core's that is no phase."""

    def start(self, barrier: bool = False) -> None:
        """Nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing."""


_NOTHING = _Nothing()
