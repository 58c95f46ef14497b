"""Carry a recipe out: passes one after another by datatrove's executor, then the count that nothing was lost."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_davinci.darwin.asking import StreamStep
from megatron_davinci.darwin.corpus import Corpus, finish
from megatron_davinci.darwin.executor import Executor
from megatron_davinci.darwin.parts import remove_temporary
from megatron_davinci.darwin.pipeline import (
    Acquire,
    Apply,
    ReadParts,
    Shared,
    Sketch,
    Solve,
    WriteParts,
)
from megatron_davinci.darwin.plan import Pass, Plan, make_plan
from megatron_davinci.darwin.recipe import LoadedRecipe
from megatron_davinci.darwin.watching import Progress, watched
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.files import write_atomically


def run_recipe(
    loaded: LoadedRecipe,
    workers: int | None = None,
    restart: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Corpus:
    """Make the corpus of a recipe, or go on with it where an earlier run stopped.

    A task (some megabytes of input) that is done is not done again. What is written is the same however often the run
    was stopped, and however many workers there are.

    Args:
        loaded: The recipe.
        workers: Processes; None for one a core.
        restart: Begin anew.
        progress: Is told now and then how far it is.

    Returns:
        The finished corpus.

    Raises:
        ConfigError: The recipe does not fit the folder.
        DataError: An input file has changed; or documents are missing at the end, which no run may pass over.
        EnvironmentProblem: The disk is full, or another run is at work in the folder.
    """
    out = loaded.out
    with locked(out):
        plan = make_plan(loaded, restart)
        if (out / "corpus.json").exists():
            shutil.rmtree(plan.work, ignore_errors=True)
            return Corpus.load(out)
        write_atomically(out / "recipe.yaml", loaded.path.read_bytes())
        remove_temporary(out)
        passes = plan.passes()
        cores = len(os.sched_getaffinity(0))
        for number, each in enumerate(passes):
            _run_pass(plan, number, each, len(passes), min(workers or cores, plan.tasks), progress)
        corpus = finish(plan, len(passes))
        shutil.rmtree(plan.work, ignore_errors=True)
        return corpus


def _run_pass(
    plan: Plan, number: int, each: Pass, passes: int, workers: int, progress: Callable[[Progress], None]
) -> None:
    work, shared, recipe = plan.work / f"{number:02d}", Shared(), plan.recipe
    pipeline: list[Any]
    if each.before is None:
        limit = recipe.limits.document_bytes
        pipeline = [Acquire(shared, plan.files, plan.deal, recipe.sources, limit, plan.steps)]
    else:
        before = plan.work / f"{number - 1:02d}"
        _execute(
            [Solve(each.before, before / "sketches", work / "verdicts", plan.tasks)], 1, 1, work / "solve"
        )
        pipeline = [ReadParts(shared, before / "documents", each.before, work / "verdicts")]
    for step in each.steps:
        if isinstance(step, StreamStep):
            step.processes = workers
    pipeline += [Apply(shared, step, work / "told", place) for place, step in enumerate(each.steps)]
    if each.after is not None:
        pipeline.append(Sketch(shared, each.after, work / "sketches"))
    last = recipe.output.format if each.after is None else None
    pipeline.append(WriteParts(shared, plan.out, number, last, plan.tokenizer, work))
    names = [step.name for step in each.steps]
    what = ", ".join(([each.before.name] if each.before else ["acquire"]) + names)
    sizes = [
        sum(file.size for file in plan.files[begin:end])
        for begin, end in zip(plan.deal, plan.deal[1:], strict=False)
    ]
    with watched(number + 1, passes, what, work, sizes, progress):
        _execute(pipeline, plan.tasks, workers, work / "log")


def _execute(pipeline: list[Any], tasks: int, workers: int, log: Path) -> None:
    Executor(pipeline, tasks=tasks, workers=workers, logging_dir=str(log)).run()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep the folder to one run.

    Raises:
        EnvironmentProblem: Another run has it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f".{out.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(
                "Another run is at work in this folder.", where=out, do="wait for it, or stop it"
            ) from None
        yield
