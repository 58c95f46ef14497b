"""torchrun's agent, with what it lacks: it hands signals on and waits, and knows what is not worth another start.

torch's own agent answers a signal by ending itself; its ranks get the signal and 30 seconds, then SIGKILL, and what
they ended with is not known. When one rank fails, the others get SIGTERM, which here asks for a checkpoint that
cannot be made without the one that failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from megatron_davinci.errors import AGAIN, CORRUPT, MEND, UNHEALTHY
from megatron_davinci.train.signals import AT_ONCE, STOPPING

# Ranks that ended with one of these would most likely end with it again, or were asked to end.
NOT_AGAIN = frozenset({MEND, UNHEALTHY, CORRUPT, AGAIN})
_MARGIN = 15.0  # seconds beyond the ranks' own grace, until a rank that cannot hear any more is killed
_PATIENCE = 10  # seconds for a rank to leave when another has failed


class Agent(LocalElasticAgent):
    """Starts the ranks of this node and watches them."""

    grace_seconds = 100.0  # how long ranks may take to end after a signal
    _heard: int = 0
    _since = 0.0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        # torch has set its own as it started them.
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hand_on)
        # torch closes the others by itself when a rank has ended.
        context: Any = self._pcontext
        context.close = partial(_close, context, context.close)
        return started

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        ranks = {} if self._pcontext is None else self._pcontext.pids()
        if not ranks:
            raise SignalException(
                f"{signal.Signals(number).name} before a rank was started", signal.Signals(number)
            )
        if not self._heard:
            self._heard, self._since = number, time.monotonic()
        self._remaining_restarts = 0
        for pid in ranks.values():
            # The rank alone, not its data workers: it needs them up to the step boundary.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in NOT_AGAIN for failure in result.failures.values()):
            self._remaining_restarts = 0
        if self._heard and time.monotonic() - self._since > self.grace_seconds + _MARGIN and self._pcontext:
            self._pcontext.close(signal.SIGKILL, _PATIENCE)
        return result


def _close(
    context: Any, close: Callable[..., None], death_sig: signal.Signals | None = None, timeout: int = 30
) -> None:
    """End the ranks that are left: at once, and not by a signal that asks them for a checkpoint.

    Args:
        context: torch's, of the ranks.
        close: Its own method.
        death_sig: What torch would send; only SIGKILL is.
        timeout: Seconds until SIGKILL.
    """
    processes = [handler.proc for handler in context.subprocess_handlers.values()]
    if any(process.poll() == AGAIN for process in processes):
        # They have saved, and are on their way out.
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.05)
    close(death_sig if death_sig == signal.SIGKILL else AT_ONCE, min(timeout, _PATIENCE))


@contextlib.contextmanager
def our_agent(grace_seconds: float) -> Iterator[None]:
    """Have torch's launcher start our agent.

    Args:
        grace_seconds: How long ranks may take to end after a signal.
    """
    before, Agent.grace_seconds = api.LocalElasticAgent, grace_seconds
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        yield
    finally:
        api.LocalElasticAgent = before  # type: ignore[misc]
