"""Saving a run's state: in the background, one save at a time, and again at the next one due when it fails."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_davinci.config.training import CheckpointConfig
from megatron_davinci.errors import DavinciError, EnvironmentProblem
from megatron_davinci.files import free_bytes
from megatron_davinci.platform.distributed import on_rank_zero
from megatron_davinci.platform.gathered_state import GatheredState
from megatron_davinci.platform.host_copy import HostCopy
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.retention import Retention, prune
from megatron_davinci.train.save_job import Bug, Outcome, SaveJob
from megatron_davinci.train.snapshot import take

_NO_ROOM = " The host has no memory for a copy, so it was not saved in the background."

# The same on every rank, since all of them save together; never used twice with one store.
_numbers = itertools.count()


class Saver:
    """Saves checkpoints of a run. Every rank calls `save` and `finish` at the same steps.

    Args:
        checkpoints: The run's folder of checkpoints.
        config: The section `checkpoint`.
        losses: Reads held-out loss by step, for `checkpoint.keep_best`.
        record: Called on rank 0 with the outcome of each save as soon as it is known, maybe from another thread.
        newest: The checkpoint that the run goes on from.

    Attributes:
        newest: The newest checkpoint that is known on every rank to be on the disk.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        losses: Callable[[], Mapping[int, float]] = dict,
        record: Callable[[Outcome], None] = lambda outcome: None,
        newest: Path | None = None,
    ) -> None:
        self.newest = newest
        self._checkpoints, self._config = checkpoints, config
        self._retention = Retention(config.keep, config.keep_every, config.keep_best)
        self._losses, self._record = losses, record
        self._host, self._gathered = HostCopy(), GatheredState()
        self._job: SaveJob | None = None
        self._thread: Thread | None = None
        self._failures: list[Outcome] = []
        self._news: deque[Outcome] = deque()

    def save(
        self, chunks: Sequence[Any], optimizer: Any, description: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save the state as it is now; every rank calls this.

        With `checkpoint.async_save` it returns when the state is copied. A save that is still being written is waited
        for first. A save that fails leaves older checkpoints as they are and is told by `news`.

        Args:
            chunks: The model chunks, not wrapped.
            optimizer: Megatron-Core's optimizer.
            description: Manifest fields; `step`, `consumed_samples` and `model` are needed.
            wait: Return when it is on the disk, or has failed.

        Raises:
            EnvironmentProblem: So many saves in a row have failed that the run is to stop.
        """
        began = time.perf_counter()
        self._settle()
        step = int(description["step"])
        try:
            temporary = self._begin(chunks, step)
        except DavinciError as error:
            seconds = time.perf_counter() - began
            self._count(Outcome(step, seconds, seconds, failure=error))
            return
        background = self._config.async_save and not wait
        snapshot = take(chunks, optimizer, temporary / "state", self._gathered if background else None)
        if background:
            snapshot = snapshot.copy(self._host, self._gathered)
        target = checkpoint_files.step_folder(self._checkpoints, step)
        job = SaveJob(
            next(_numbers), snapshot, temporary, target, description, began, after=lambda: self._prune(step)
        )
        self._job = job
        if snapshot.copied:
            job.waited = time.perf_counter() - began
            self._thread = Thread(target=self._run, args=(job,), name=f"save-{step}", daemon=True)
            self._thread.start()
            # Another failure would be the last: it is better known before training goes on.
            wait = 0 < len(self._failures) == self._config.stop_after_failures - 1
        else:
            self._run(job)
            # A rank whose host has no room for a copy has written by itself; the others may be at it still.
            wait = wait or not self._config.async_save
        if wait:
            self._settle()

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is on the disk, or on its way there; the same on every rank."""
        at_work = self._job is not None and self._job.step == step
        return at_work or self.newest == checkpoint_files.step_folder(self._checkpoints, step)

    def news(self) -> list[Outcome]:
        """Saves that have ended since this was asked last. Costs nothing; rank 0 alone hears of all."""
        found = []
        while self._news:
            found.append(self._news.popleft())
        return found

    def finish(self) -> None:
        """Wait until the last save is on the disk; every rank calls this.

        Raises:
            EnvironmentProblem: It failed.
        """
        self._settle()
        if self._failures:
            raise self._stop()

    def close(self) -> None:
        """Let the save that is being written come to its end. A rank may be alone here, after an error."""
        if self._job is not None:
            self._job.closing.set()
        if self._thread is not None:
            self._thread.join()

    def _begin(self, chunks: Sequence[Any], step: int) -> Path:
        need = _needed_bytes(chunks)

        def begin() -> Path:
            free = free_bytes(self._checkpoints)
            if free < need:
                raise EnvironmentProblem(
                    "There is no space for a checkpoint.",
                    where=self._checkpoints,
                    found=f"{free / 1e9:.3g} GB free",
                    expected=f"about {need / 1e9:.3g} GB",
                    do="free space",
                )
            return checkpoint_files.begin(self._checkpoints, step)

        temporary: Path = on_rank_zero(begin)
        return temporary

    def _run(self, job: SaveJob) -> None:
        job.run()
        if dist.get_rank() == 0:
            # An error that is no file system's is raised when the save is settled.
            with suppress(Bug):
                self._tell(job.outcome())

    def _prune(self, step: int) -> None:
        prune(self._checkpoints, self._retention, step, self._losses)

    def _settle(self) -> None:
        """Wait for the save at work, and learn how it ended."""
        if self._job is None:
            return
        if self._thread is not None:
            self._thread.join()
        job, self._job, self._thread = self._job, None, None
        outcome = None
        try:
            outcome = job.outcome()
        except Bug as error:
            bug = error
        # The store may end with rank 0, so no rank goes on before all have read the outcome.
        dist.barrier()
        if dist.get_rank() == 0:
            job.forget()
        if outcome is None:
            raise bug
        self._count(outcome, told=True)

    def _tell(self, outcome: Outcome) -> None:
        failures = len(self._failures) + 1 if outcome.failure is not None else 0
        outcome = replace(outcome, failures=failures)
        self._record(outcome)
        self._news.append(outcome)

    def _count(self, outcome: Outcome, *, told: bool = False) -> None:
        if not told and dist.get_rank() == 0:
            self._tell(outcome)
        if outcome.failure is None:
            self._failures.clear()
            self.newest = checkpoint_files.step_folder(self._checkpoints, outcome.step)
            return
        self._failures.append(outcome)
        if len(self._failures) >= self._config.stop_after_failures:
            raise self._stop()

    def _stop(self) -> EnvironmentProblem:
        if len(self._failures) == 1 and self._failures[0].failure is not None:
            last = self._failures[0].failure
            return EnvironmentProblem(
                last.what,
                where=last.where,
                found=last.found,
                expected=last.expected,
                do="mend that, then start the same command again: the run goes on from its newest checkpoint, "
                "which is whole",
            )
        return EnvironmentProblem(
            f"{len(self._failures)} checkpoints in a row could not be saved, so the run stops.",
            where=self._checkpoints,
            found="\n".join(f"step {one.step}: {_short(one.failure)}" for one in self._failures),
            do="free space or mend the disk, then start the same command again: the run goes on from its newest "
            "checkpoint, which is whole",
        )


def told(outcome: Outcome, config: CheckpointConfig) -> str:
    """A line for whoever watches the run.

    Args:
        outcome: Of a save.
        config: The section `checkpoint`.
    """
    if outcome.failure is None:
        return (
            f"Checkpoint of step {outcome.step:,} is on the disk, read back: {outcome.bytes / 1e9:.3g} GB in "
            f"{outcome.seconds:.2g} s, of which training waited {outcome.waited:.2g} s."
            + (_NO_ROOM if config.async_save and outcome.waited == outcome.seconds else "")
        )
    return (
        f"The checkpoint of step {outcome.step:,} could not be saved: {_short(outcome.failure)}. Older ones are as "
        f"they were; training goes on, and the next one due is tried. Failed in a row: {outcome.failures}; the run "
        f"stops at {config.stop_after_failures}."
    )


def _short(failure: DavinciError | None) -> str:
    assert failure is not None
    details = "; ".join(str(part) for part in (failure.found, failure.where) if part is not None)
    return f"{failure.what.rstrip('.')} ({details})".replace("\n", " ")


def _needed_bytes(chunks: Sequence[Any]) -> int:
    """What a checkpoint takes, about: weights, and in fp32 the main weights and both moments."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    local = sum(weight.numel() * (weight.element_size() + 12) for weight in weights)
    # Data- and context-parallel ranks hold the same ones.
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    total = torch.tensor(local if first else 0, dtype=torch.int64, device=weights[0].device)
    dist.all_reduce(total)
    return int(total)
