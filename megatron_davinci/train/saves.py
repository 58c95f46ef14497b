"""Saving as a run's configuration and directory want it, and the record of it: `saves.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from megatron_davinci.config import RunConfig
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.train.background_export import BackgroundExport
from megatron_davinci.train.checkpoint_files import Checkpoint
from megatron_davinci.train.retention import losses_by_step
from megatron_davinci.train.run_directory import RunDirectory, append_line, read_lines
from megatron_davinci.train.save_job import Outcome
from megatron_davinci.train.saver import Saver


def saver_of(
    config: RunConfig, directory: RunDirectory, found: Checkpoint | None, exports: BackgroundExport
) -> Saver:
    """What saves the checkpoints of a run.

    Args:
        config: The run configuration.
        directory: The run directory.
        found: The checkpoint that the run goes on from; None where it begins.
        exports: Is told of each save.
    """

    def losses() -> Mapping[int, float]:
        return losses_by_step(read_lines(directory.evaluations), config.checkpoint.best_by)

    def record(outcome: Outcome) -> None:
        # A disk that is full has no room for this either, and the run has said it.
        with suppress(EnvironmentProblem):
            append_line(directory.saves, line_of(outcome))
        if outcome.failure is None:
            exports.saved(outcome.step)
        else:
            exports.save_failed()

    newest = None if found is None else found.folder
    return Saver(directory.checkpoints, config.checkpoint, losses, record, newest=newest)


def line_of(outcome: Outcome) -> dict[str, Any]:
    """The line of `saves.jsonl` for a save."""
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": outcome.step,
        "saved": outcome.failure is None,
        "seconds": round(outcome.seconds, 6),
        "waited_seconds": round(outcome.waited, 6),
    }
    if outcome.failure is None:
        return {**line, "bytes": outcome.bytes}
    return {**line, "failures_in_a_row": outcome.failures, "error": str(outcome.failure)}
