"""datatrove's local executor, on a pool that notices when a worker is killed.

Tasks, their marks of completion and their order are datatrove's. Its pool is `multiprocessing.Pool`, which waits for
ever for the task of a worker that the system has killed for its memory; `concurrent.futures` says that it is broken.
"""

from __future__ import annotations

import copy
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process, set_start_method
from threading import Thread

from datatrove.executor.local import LocalPipelineExecutor

from megatron_davinci.errors import EnvironmentProblem

# What a worker needs, imported once by the server that workers are forked from.
_PRELOAD = ["megatron_davinci.darwin.catalogue", "megatron_davinci.darwin.executor"]


class Executor(LocalPipelineExecutor):
    """Runs the tasks of a pipeline that are not done yet."""

    def run(self) -> None:
        """Run them, in this process for one worker, else in processes.

        Raises:
            EnvironmentProblem: A worker was killed. Tasks that were done are.
            DavinciError: What a task raised; the others are given up.
        """
        todo = self.get_incomplete_ranks(range(self.tasks))
        workers = min(self.workers, len(todo))
        if workers <= 1:
            for rank in todo:
                _run_task(self, rank)
            return
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
            futures = [pool.submit(_run_task, self, rank) for rank in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BrokenProcessPool as error:
                raise EnvironmentProblem(
                    "A worker was killed.",
                    where=self.logging_dir.path,
                    found="most often the system does it when memory runs out; `dmesg` says so",
                    expected=f"memory for {workers} workers",
                    do="start the same command again, with fewer --workers: tasks that are done are kept",
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _begin_worker() -> None:
    """Have this worker end when the process that it works for is killed: it would wait for tasks for ever.

    What it starts itself (the process that extracts text) it forks, and is the parent of: that ends with it.
    """
    set_start_method("fork", force=True)
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def _run_task(executor: Executor, rank: int) -> None:
    """Run one task on steps of its own; those of the executor stay as they are."""
    own = copy.copy(executor)
    own.pipeline = copy.deepcopy(executor.pipeline)
    own._run_for_rank(rank)
