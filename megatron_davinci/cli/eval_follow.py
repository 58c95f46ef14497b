"""`davinci eval RUN --follow`: every checkpoint as it appears, beside a run that is at work."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_davinci.cli.eval_plan import given_in, task_names
from megatron_davinci.errors import MEND, ConfigError
from megatron_davinci.evaluate.answers import digest_of_folder
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
    tried: set[tuple[int, str | None]] = set()
    while True:
        # By their digests too: a run that turned back takes a step again, and saves another checkpoint of it.
        there = {
            checkpoint_files.step_of(path): digest_of_folder(path)
            for path in checkpoint_files.steps(run / "checkpoints")
        }
        done = set() if arguments.again else on_record(out, arguments, there)
        fresh = sorted(step for step in {*there} - done if (step, there[step]) not in tried)
        for step in fresh:
            if not checkpoint_files.step_folder(run / "checkpoints", step).exists():
                continue
            tried.add((step, there[step]))
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


def on_record(out: Path, arguments: argparse.Namespace, there: Mapping[int, str | None]) -> set[int]:
    """Steps at which everything that is asked for has a result; what had a problem is asked again.

    Args:
        out: Where results are.
        arguments: What is asked for, and how.
        there: Digests of the checkpoints that there are, by step; None where one is not known.
    """
    given = _beside_shots(given_in(arguments))
    wanted = set(task_names(arguments.tasks)) if arguments.tasks else set()
    if arguments.both_ways:
        wanted |= {generated(name) for name in wanted}
    found: dict[int, list[dict[str, Any]]] = {}
    for record in read_records(out):
        if (
            record.get("suite") == arguments.suite
            and record.get("limit") == arguments.limit
            and record.get("formats", False) >= arguments.formats
            and _beside_shots(record.get("given") or {}) == given
            and (digest := there.get(record["step"]))
            in (None, (record.get("identity") or {}).get("checkpoint", digest))
            and (arguments.suite or _shots(record, arguments.shots))
        ):
            found.setdefault(record["step"], []).append(record)
    return {step for step, records in found.items() if not unmeasured(records, arguments.suite, wanted)}


def _beside_shots(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "shots"}


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
