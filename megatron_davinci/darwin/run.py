"""Carry a recipe out: passes one after another by datatrove's executor, then the count that nothing was lost."""

from __future__ import annotations

import fcntl
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
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.files import disk_errors, write_atomically
from megatron_davinci.platform.cores import usable_cores


def run_recipe(
    loaded: LoadedRecipe,
    workers: int | None = None,
    restart: bool = False,
    executor: str = "local",
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Corpus:
    """Make the corpus of a recipe, or go on with it where an earlier run stopped.

    A task (some megabytes of input) that is done is not done again. What is written is the same however often the run
    was stopped, and however many workers there are.

    Args:
        loaded: The recipe.
        workers: Tasks at once; None for one a core, on a cluster for as many as it takes.
        restart: Begin anew.
        executor: `local`, `slurm` or `ray`; which one makes no difference to the corpus.
        progress: Is told now and then how far it is.

    Returns:
        The finished corpus.

    Raises:
        ConfigError: The recipe does not fit the folder.
        DataError: An input file has changed; or documents are missing at the end, which no run may pass over.
        EnvironmentProblem: The disk is full, or another run is at work in the folder.
    """
    out = loaded.out
    if workers is not None and workers < 1:
        raise ConfigError("A run needs a worker.", where="--workers", found=workers, expected="1 or more")
    if executor == "slurm" and loaded.recipe.slurm is None:
        raise ConfigError(
            "The recipe does not say how tasks are submitted to Slurm.",
            where=f"{loaded.path}: slurm",
            expected='slurm: {partition: NAME, time: "04:00:00"}',
        )
    with locked(out):
        _wait_for_jobs(out)
        plan = make_plan(loaded, restart)
        if (out / "corpus.json").exists():
            shutil.rmtree(plan.work, ignore_errors=True)
            return Corpus.load(out)
        write_atomically(out / "recipe.yaml", loaded.path.read_bytes())
        remove_temporary(out)
        passes = plan.passes()
        execute = Execute(executor, loaded, workers)
        for number, each in enumerate(passes):
            _run_pass(plan, number, each, len(passes), execute, progress)
        corpus = finish(plan, len(passes))
        shutil.rmtree(plan.work, ignore_errors=True)
        return corpus


def _run_pass(
    plan: Plan, number: int, each: Pass, passes: int, execute: Execute, progress: Callable[[Progress], None]
) -> None:
    work, shared, recipe = plan.work / f"{number:02d}", Shared(), plan.recipe
    pipeline: list[Any]
    if each.before is None:
        limit = recipe.limits.document_bytes
        pipeline = [Acquire(shared, plan.files, plan.deal, recipe.sources, limit, plan.steps)]
    else:
        before = plan.work / f"{number - 1:02d}"
        execute([Solve(each.before, before / "sketches", work / "verdicts", plan.tasks)], 1, work / "solve")
        pipeline = [ReadParts(shared, before / "documents", each.before, work / "verdicts")]
    for step in each.steps:
        if isinstance(step, StreamStep):
            step.processes = execute.at_once(plan.tasks)
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
        execute(pipeline, plan.tasks, work / "log")


class Execute:
    """Runs the tasks of a pipeline that are not done, and returns when all are.

    Args:
        kind: `local`, `slurm` or `ray`.
        loaded: The recipe.
        workers: Tasks at once; None for one a core, on a cluster for as many as it takes.
    """

    def __init__(self, kind: str, loaded: LoadedRecipe, workers: int | None) -> None:
        self.kind, self.loaded, self.workers = kind, loaded, workers

    def at_once(self, tasks: int) -> int:
        """How many of so many tasks run at once, at most."""
        here = usable_cores() if self.kind == "local" else tasks
        return min(self.workers or here, tasks)

    def __call__(self, pipeline: list[Any], tasks: int, log: Path) -> None:
        """Run them."""
        recipe = self.loaded.recipe
        if self.kind == "slurm" and recipe.slurm is not None:
            from megatron_davinci.darwin.slurm import SlurmExecutor

            name = f"{recipe.name}-{log.parent.name}"
            SlurmExecutor(pipeline, tasks, self.workers or -1, log, recipe.slurm, name).run()
        elif self.kind == "ray":
            from megatron_davinci.darwin.ray_cluster import RayExecutor

            RayExecutor(pipeline, tasks, self.workers or -1, log, recipe.ray).run()
        else:
            Executor(pipeline, tasks=tasks, workers=self.at_once(tasks), logging_dir=str(log)).run()


def _wait_for_jobs(out: Path) -> None:
    """Wait for jobs that an earlier start has submitted: what they write may not be taken for leftovers."""
    logs = [mark.parent for mark in out.glob("work/*/*/job")]
    if logs:
        from megatron_davinci.darwin.slurm import wait_for_job

        for log in logs:
            wait_for_job(log)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep the folder to one run.

    Raises:
        EnvironmentProblem: Another run has it, or it cannot be made.
    """
    with disk_errors(out, "making the folder of a corpus"):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.with_name(f".{out.name}.lock"), "w")  # noqa: SIM115
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(
                "Another run is at work in this folder.", where=out, do="wait for it, or stop it"
            ) from None
        yield
