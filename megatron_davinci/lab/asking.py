"""Asking finished runs tasks, as a design says: `davinci eval` of each, whose scores are metrics then.

A run is called by what it computes, and tasks change nothing of that; so a design may ask runs that another trained.
What was answered is not asked again: `davinci eval` keeps its answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_davinci.evaluate.results import standing, unmeasured
from megatron_davinci.lab.arms import Run
from megatron_davinci.lab.design import Design, Evaluate
from megatron_davinci.lab.outcomes import TASK, folder_of, outcome_of, results_of
from megatron_davinci.platform.background_process import of_no_rank


def command_of(evaluate: Evaluate, folder: Path) -> list[str]:
    """What is started for one run.

    Args:
        evaluate: What the design asks.
        folder: The run's.
    """
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "eval", str(folder)]
    if evaluate.suite is not None:
        command += ["--suite", evaluate.suite]
    else:
        command += ["--tasks", ",".join(evaluate.tasks)]
    if evaluate.data is not None:
        command += ["--data", str(evaluate.data)]
    if evaluate.limit is not None:
        command += ["--limit", str(evaluate.limit)]
    return command + ["--both-ways"] * (evaluate.both_ways and evaluate.suite is None)


def missing(design: Design, root: Path, run: Run) -> list[str]:
    """What a run has not answered yet: task metrics of the design, and without any, all that it asks."""
    evaluate = design.evaluate
    if evaluate is None:
        return []
    outcome = outcome_of(root, run, evaluate)
    names = [metric.name for metric in design.metrics if metric.name.startswith(TASK)]
    if names:
        return [name for name in names if outcome.metric(name) is None]
    answered = results_of(folder_of(root, run), outcome.step, evaluate)
    return sorted(unmeasured(answered, evaluate.suite, evaluate.names))


def unanswerable(design: Design, root: Path, run: Run) -> set[str]:
    """Those tasks of a run that had the same problem the last two times that they were asked."""
    if design.evaluate is None:
        return set()
    step = outcome_of(root, run).step
    return standing(results_of(folder_of(root, run), step, design.evaluate))


def ask(
    design: Design,
    root: Path,
    runs: Sequence[Run],
    *,
    parallel: int,
    again: bool = True,
    say: Callable[[Run, str], None] = lambda run, problem: None,
) -> None:
    """Ask every run that is done and has not been asked yet.

    Args:
        design: That says what is asked; nothing happens where it asks nothing.
        root: The lab's folder.
        runs: Of the design.
        parallel: How many at a time.
        again: Also runs that lack only what had the same problem twice; a model is loaded for each.
        say: Is told of each that was asked, or is not asked again, and what went wrong; its log has the rest.
    """
    evaluate = design.evaluate
    if evaluate is None:
        return

    def one(run: Run) -> tuple[Run, str]:
        log = root / "logs" / f"{run.identity}.eval.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = command_of(evaluate, folder_of(root, run))
        with open(log, "ab") as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=of_no_rank(),
                check=False,
            ).returncode  # fmt: skip
        without = missing(design, root, run)
        if not without:
            return run, ""
        return (
            run,
            f"no score of {', '.join(without)} (davinci eval ended with {code}; {os.path.relpath(log)})",
        )

    left = {}
    for run in {run.identity: run for run in runs}.values():
        without = missing(design, root, run) if outcome_of(root, run).state == "done" else []
        hopeless = set() if again else unanswerable(design, root, run)
        if any(_task_of(name, hopeless) is None for name in without):
            left[run.identity] = run
        elif without:
            tasks = sorted({str(_task_of(name, hopeless)) for name in without})
            say(run, f"not again: the same problem twice in {', '.join(tasks)} (--retry asks again)")
    with ThreadPoolExecutor(max(1, parallel)) as pool:
        for run, problem in pool.map(one, left.values()):
            say(run, problem)


def _task_of(name: str, tasks: Iterable[str]) -> str | None:
    """The one of some tasks that is missing by this name, which is its own or a metric's; None for none of them."""
    return next((one for one in tasks if name == one or name.startswith(f"{TASK}{one}.")), None)
