"""What datatrove's executors for Slurm and Ray share here, and what closes traps of theirs.

Each task works on a pipeline of its own (theirs is shared by the tasks of a job, which would add up what they count),
and tasks that have not finished are an error (theirs is a line in a log).
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.stats import PipelineStats

from megatron_davinci.errors import EnvironmentProblem

GRACE_SECONDS = 30.0  # that a network file system may take to show the mark of a task that has ended


class OnCluster(PipelineExecutor):
    """Laid before one of datatrove's executors."""

    kind: str
    cpus_per_task: int
    mem_per_cpu_gb: float

    def save_executor_as_json(self, indent: int = 4) -> None:
        """Write nothing: the plan says it."""

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        """Each task has one node, whose name nobody asks for."""
        return DistributedEnvVars(
            datatrove_node_ips="",
            datatrove_cpus_per_task=str(self.cpus_per_task),
            datatrove_mem_per_cpu=str(self.mem_per_cpu_gb),
            datatrove_gpus_on_node="0",
            datatrove_executor=self.kind,
        )

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        own: Any = copy.copy(self)
        own.pipeline = copy.deepcopy(self.pipeline)
        return super(OnCluster, own)._run_for_rank(rank, local_rank, node_rank)

    def check_done(self, log: Path, pattern: str) -> None:
        """See that every task has left its mark.

        Args:
            log: The folder of marks and logs.
            pattern: Of logs in it.

        Raises:
            EnvironmentProblem: One has not, with the last that the latest log says.
        """
        deadline = time.monotonic() + GRACE_SECONDS
        while (missing := self.get_incomplete_ranks()) and time.monotonic() < deadline:
            time.sleep(min(1.0, GRACE_SECONDS / 10))
        if not missing:
            return
        logs = sorted(log.glob(pattern), key=lambda path: path.stat().st_mtime)
        said = logs[-1].read_text(errors="replace").strip().splitlines() if logs else []
        raise EnvironmentProblem(
            f"{len(missing)} of {self.world_size} tasks have not finished.",
            where=logs[-1] if logs else log,
            found="\n".join(said[-8:]) or "no log",
            do="mend what it says, and start the same command again: tasks that are done are kept",
        )
