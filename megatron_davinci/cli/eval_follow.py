"""`davinci eval RUN --follow`: every checkpoint as it appears, beside a run that is at work."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_davinci.errors import MEND, ConfigError
from megatron_davinci.evaluate.naming import generated
from megatron_davinci.evaluate.results import read_records, unmeasured

POLL_SECONDS = 10.0
QUIET_SECONDS = 60.0  # without a trainer and a new checkpoint, before it ends


def follow_run(
    arguments: argparse.Namespace,
    words: Sequence[str],
    *,
    evaluate: Callable[[Sequence[str]], int] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Evaluate what a run has saved and goes on to save, the oldest first; end when the run has ended.

    Each checkpoint is evaluated by a process of its own, of the lowest priority: nothing is left of one when the next
    comes, and training keeps its cores. A checkpoint that is on record is left out, so the command may be stopped and
    started again, and --again asks it anew; one that the run has removed in the meantime is passed over.

    Args:
        arguments: The command's.
        words: Its options, for the process of a checkpoint.
        evaluate: Runs `davinci eval` with words.
        wait: Sleeps.

    Returns:
        0, or 2 where a checkpoint had a task without a result.
    """
    from megatron_davinci.train import checkpoint_files

    run = Path(arguments.run)
    if not (run / "config.yaml").exists():
        raise ConfigError(
            "There is no run to follow.", where=run, expected="a run directory", do="start the run first"
        )
    evaluate = evaluate or _in_a_process
    out = arguments.out or run / "evals"
    code, quiet = 0, 0.0
    tried: set[int] = set()
    while True:
        there = [checkpoint_files.step_of(path) for path in checkpoint_files.steps(run / "checkpoints")]
        done = set() if arguments.again else on_record(out, arguments)
        fresh = sorted({*there} - done - tried)
        for step in fresh:
            if not checkpoint_files.step_folder(run / "checkpoints", step).exists():
                continue
            tried.add(step)
            print(f"step {step}", flush=True)
            if evaluate([f"{run}@{step}", *words]):
                code = MEND
        if not fresh:
            quiet = 0.0 if _at_work(run) else quiet + POLL_SECONDS
            if quiet >= QUIET_SECONDS:
                return code
            wait(POLL_SECONDS)
        else:
            quiet = 0.0


def on_record(out: Path, arguments: argparse.Namespace) -> set[int]:
    """Steps at which everything that is asked for has a result; what had a problem is asked again."""
    wanted = set(arguments.tasks.split(",")) - {""} if arguments.tasks else set()
    if arguments.both_ways:
        wanted |= {generated(name) for name in wanted}
    found: dict[int, list[dict[str, Any]]] = {}
    for record in read_records(out):
        if (
            record.get("suite") == arguments.suite
            and record.get("limit") == arguments.limit
            and record.get("formats", False) >= arguments.formats
            and (record.get("given") or {}).get("texts", []) == list(arguments.texts)
            and (arguments.suite or _shots(record, arguments.shots))
        ):
            found.setdefault(record["step"], []).append(record)
    return {step for step, records in found.items() if not unmeasured(records, arguments.suite, wanted)}


def _shots(record: dict[str, Any], wanted: int | None) -> bool:
    """Whether a task was shown as many examples as are wanted; None for as many as it says itself."""
    if wanted is None:
        return (record.get("given") or {}).get("shots") is None
    return bool(record.get("shots") == wanted)


def _at_work(run: Path) -> bool:
    """Whether a trainer holds the run: it writes to its lock every ten seconds, and removes it when it ends."""
    try:
        return time.time() - (run / "lock").stat().st_mtime < QUIET_SECONDS
    except OSError:
        return False


def _in_a_process(words: Sequence[str]) -> int:
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "eval", *words]
    return subprocess.run(command, preexec_fn=lambda: os.nice(19), check=False).returncode
