"""Mistakes that a trainer could make, as patches of the package: the trials of `tests/faults` must notice every one.

Each is a mistake that trainers have made (the resume that forgets the random numbers or the optimizer, the pointer
that moves before the data is there, ...). A patch holds for the process that applies it: a rank that a test started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

Patch = Callable[[], None]


def apply(name: str) -> None:
    """Have the package do a thing wrongly in this process; nothing for an empty name."""
    if name:
        MUTANTS[name]()


# ---- resuming -------------------------------------------------------------------------------------------------


def _drop_rng_restore() -> None:
    from megatron_davinci.platform import distributed

    seed, before = distributed.seed_ranks, []

    def once(number: int, **more: Any) -> None:
        if not before:
            before.append(number)
            seed(number, **more)

    distributed.seed_ranks = once


def _draw_after_rng_restore() -> None:
    import torch

    from megatron_davinci.train.step import Stepper

    train, begun = Stepper.train, []

    def drawing(self: Any, *given: Any, **named: Any) -> Any:
        if not begun:
            begun.append(torch.rand(1))
        return train(self, *given, **named)

    Stepper.train = drawing  # type: ignore[method-assign]


def _drop_sampler_counter() -> None:
    from megatron_davinci.train.feed import Feed

    numbers, begun = Feed.numbers, []

    def from_the_beginning(self: Any, first_sample: int, batch: int) -> Any:
        begun[:] = begun or [first_sample]
        return numbers(self, first_sample - begun[0], batch)

    Feed.numbers = from_the_beginning  # type: ignore[method-assign]


def _drop_optimizer() -> None:
    from megatron_davinci.train import checkpoint

    load = checkpoint.load

    def load_weights(found: Any, chunks: Any, optimizer: Any) -> None:
        load(found, chunks, optimizer)
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for state in one.optimizer.state.values():
                for value in state.values():
                    if hasattr(value, "zero_"):
                        value.zero_()

    checkpoint.load = load_weights


def _reset_scheduler_step() -> None:
    from megatron_davinci.train.loop import TrainingRun

    step, begun = TrainingRun._step, []

    def anew(self: Any, plan: Any, *rest: Any) -> Any:
        begun[:] = begun or [plan.first_sample]
        rate = self.schedule.at(plan.first_sample - begun[0]).learning_rate
        return step(self, replace(plan, learning_rate=rate), *rest)

    TrainingRun._step = anew  # type: ignore[method-assign]


def _last_stage_always() -> None:
    from megatron_davinci.optim.schedule import Schedule

    at = Schedule.at

    def of_the_last(self: Any, sample: int) -> Any:
        plan, last = at(self, sample), at(self, self.total_samples - 1 - (self.total_samples - 1) % 8)
        return replace(plan, stage=last.stage, stage_name=last.stage_name, learning_rate=last.learning_rate)

    Schedule.at = of_the_last  # type: ignore[method-assign]


def _shard_data_by_rank() -> None:
    import numpy as np

    from megatron_davinci.train import feed

    def own_part(
        first_sample: int, batch: int, *, data_rank: int, data_ranks: int, micro_batch_size: int
    ) -> np.ndarray:
        mine = batch // data_ranks
        return np.arange(mine, dtype=np.int64) + first_sample // data_ranks + data_rank * 100

    feed.rank_samples = own_part


def _each_rank_chooses() -> None:
    from megatron_davinci.train import checkpoint, checkpoint_files

    def alone(checkpoints: Path, turned_back: Any = lambda one: None) -> Any:
        found, problems = checkpoint_files.newest_good(checkpoints, turned_back)
        return found, [str(problem) for problem in problems]

    checkpoint.find = alone


# ---- what is on the disk --------------------------------------------------------------------------------------


def _visible_before_it_is_whole() -> None:
    from megatron_davinci.train import checkpoint_files

    rename = os.rename

    def copy(old: Any, new: Any) -> None:
        if ".tmp-" in str(old) and os.path.isdir(old):
            shutil.copytree(old, new)
            shutil.rmtree(old)
        else:
            rename(old, new)

    checkpoint_files.os.rename = copy


def _no_sync_of(is_of_kind: Callable[[int], bool]) -> Patch:
    def patch() -> None:
        fsync = os.fsync
        os.fsync = lambda file: None if is_of_kind(os.fstat(file).st_mode) else fsync(file)

    return patch


def _remove_before_it_is_verified() -> None:
    from megatron_davinci.train import save_job

    commit = save_job.SaveJob._commit

    def remove_and_commit(self: Any, *given: Any) -> int:
        with contextlib.suppress(OSError):  # `ignore_errors` lets some through
            shutil.rmtree(self.target.parent / "step-00000010", ignore_errors=True)
        return commit(self, *given)

    save_job.SaveJob._commit = remove_and_commit  # type: ignore[method-assign]


def _say_no_failure() -> None:
    from megatron_davinci.train import save_job

    outcome = save_job.SaveJob.outcome
    save_job.SaveJob.outcome = lambda self: replace(outcome(self), failure=None)  # type: ignore[method-assign]


def _verify_no_digest() -> None:
    from megatron_davinci.train import checkpoint_files

    read = checkpoint_files.read
    checkpoint_files.read = lambda folder, *, verify=True: read(folder, verify=False)


def _take_short_reads() -> None:
    import numpy as np

    from megatron_davinci.data.native import Library

    read = Library.read_windows

    def believing(self: Any, fds: Any, offsets: Any, tokens: Any, rows: Any, *, wait: bool) -> Any:
        got, highest = read(self, fds, offsets, tokens, rows, wait=wait)
        return np.full_like(got, tokens.shape[1] * tokens.itemsize), highest

    Library.read_windows = believing  # type: ignore[method-assign]


# ---- ends -----------------------------------------------------------------------------------------------------


def _code_0_for_a_failure() -> None:
    from megatron_davinci.cli import train

    guarded = train.guarded

    def well(*given: Any, **named: Any) -> int:
        guarded(*given, **named)
        return 0

    train.guarded = well


def _hear_no_sigterm() -> None:
    import signal

    from megatron_davinci.train.signals import SignalWatch

    hear = SignalWatch._hear
    SignalWatch._hear = (  # type: ignore[method-assign]
        lambda self, number: None if number == signal.SIGTERM else hear(self, number)
    )


MUTANTS: dict[str, Patch] = {
    "the random numbers are not restored": _drop_rng_restore,
    "numbers are drawn after they are restored": _draw_after_rng_restore,
    "the sampler begins anew": _drop_sampler_counter,
    "the optimizer begins anew": _drop_optimizer,
    "the learning rate begins anew": _reset_scheduler_step,
    "the last stage is always the one": _last_stage_always,
    "each rank has a part of the data": _shard_data_by_rank,
    "each rank chooses its checkpoint": _each_rank_chooses,
    "visible before it is whole": _visible_before_it_is_whole,
    "files are not synced": _no_sync_of(stat.S_ISREG),
    "folders are not synced": _no_sync_of(stat.S_ISDIR),
    "old ones are removed first": _remove_before_it_is_verified,
    "a failure is not said": _say_no_failure,
    "digests are not looked at": _verify_no_digest,
    "short reads are taken": _take_short_reads,
    "code 0 for a failure": _code_0_for_a_failure,
    "SIGTERM is not heard": _hear_no_sigterm,
}
