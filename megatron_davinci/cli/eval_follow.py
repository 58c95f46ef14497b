"""`davinci eval RUN --follow`: every checkpoint as it appears, beside a run that is at work."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_davinci.errors import MEND, ConfigError
from megatron_davinci.evaluate.naming import generated

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
    started again; one that the run has removed in the meantime is passed over.

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
        fresh = sorted({*there} - on_record(out, arguments) - tried)
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
    """Steps at which everything that is asked for has been measured."""
    wanted = set(arguments.tasks.split(",")) - {""} if arguments.tasks else {arguments.suite}
    if arguments.tasks and arguments.both_ways:
        wanted |= {generated(name) for name in wanted}
    found: dict[int, set[str]] = {}
    try:
        lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("limit") == arguments.limit and record.get("formats", False) >= arguments.formats:
            # A suite's last line is what says that all of it was there.
            names = {record.get("task")} if arguments.tasks else {record["suite"]} if _last(record) else set()
            found.setdefault(int(record.get("step", -1)), set()).update(names)
    return {step for step, names in found.items() if wanted <= names}


def _last(record: dict[str, object]) -> bool:
    return (
        "means" in record
        or "texts" in record
        or record.get("task") == "geometry"
        or bool(record.get("suite_ends"))
    )


def _at_work(run: Path) -> bool:
    """Whether a trainer holds the run: it writes to its lock every ten seconds, and removes it when it ends."""
    try:
        return time.time() - (run / "lock").stat().st_mtime < QUIET_SECONDS
    except OSError:
        return False


def _in_a_process(words: Sequence[str]) -> int:
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "eval", *words]
    return subprocess.run(command, preexec_fn=lambda: os.nice(19), check=False).returncode
