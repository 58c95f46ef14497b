"""The executor `slurm`: datatrove's, which submits a pass as an array of jobs, and here waits for it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_davinci.darwin.on_cluster import OnCluster
from megatron_davinci.darwin.recipe import SlurmCluster
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.files import write_atomically

JOB = "job"
POLL_SECONDS = 5.0


class SlurmExecutor(OnCluster, SlurmPipelineExecutor):
    """Submits the tasks that are not done as an array, and waits for them.

    Started again, it waits for the jobs that an earlier start has submitted before it submits what is left. Tasks run
    by the Python that submits them, which must lie on a file system that the nodes see, like the corpus.

    The jobs of a folder have one name that no others have, and are asked for by it: an array that Slurm's limits part
    has several, and a start that is killed while it submits knows no number.
    """

    kind = "SLURM"

    def __init__(
        self, pipeline: list[Any], tasks: int, workers: int, log: Path, cluster: SlurmCluster, name: str
    ) -> None:
        ours = hashlib.sha256(bytes(log.resolve())).hexdigest()[:12]
        super().__init__(
            pipeline,
            tasks=tasks,
            time=cluster.time,
            partition=cluster.partition,
            cpus_per_task=cluster.cpus,
            mem_per_cpu_gb=cluster.memory_gb,
            workers=workers,
            job_name=f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}-{ours}",
            qos=cluster.qos,
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            sbatch_args={key.replace("_", "-"): value for key, value in cluster.options.items()},
            max_array_size=cluster.max_array,
            tasks_per_job=cluster.tasks_per_job,
            logging_dir=str(log),
            with_srun=False,
        )

    def run(self) -> None:
        """Submit and wait; on a node, do the tasks of this element of the array.

        Raises:
            EnvironmentProblem: There is no Slurm, it refuses the job, or tasks have failed.
        """
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            super().run()
            return
        log = Path(self.logging_dir.path)
        wait_for_job(log)
        if self.get_incomplete_ranks():
            self._submit(log)
            wait_for_job(log)
        self.check_done(log, "slurm_logs/*.out")

    def _submit(self, log: Path) -> None:
        write_atomically(log / JOB, self.job_name)
        try:
            self.launch_job()
        except FileNotFoundError as error:
            (log / JOB).unlink()
            raise EnvironmentProblem(
                "There is no Slurm on this machine.",
                found=f"no {error.filename}",
                expected="sbatch and squeue on the PATH",
                do="start on a node that submits jobs, or use --executor local or ray",
            ) from error
        except subprocess.CalledProcessError as error:
            raise EnvironmentProblem(
                "Slurm has refused a job.",
                where=log / "launch_script.slurm",
                found=f"sbatch ended with status {error.returncode}; what it said stands above",
                do="mend the section `slurm` of the recipe",
            ) from error

    def launch_merge_stats(self) -> None:
        """Submit nothing: the corpus counts for itself."""


def wait_for_job(log: Path) -> None:
    """Wait until the jobs that were submitted for a folder, if there are any, are no longer in the queue."""
    mark = log / JOB
    if not mark.exists():
        return
    name = mark.read_text().strip()
    while _queued(name):
        time.sleep(POLL_SECONDS)
    mark.unlink()


def _queued(name: str) -> bool:
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", f"--name={name}", "--format=%i"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise EnvironmentProblem(
            "A job of this corpus was submitted to Slurm, and there is no Slurm on this machine.",
            found=f"job {name}, and no squeue",
            do="start the same command where it was submitted",
        ) from error
    # A failure, such as of a controller that restarts, says nothing.
    return asked.returncode != 0 or bool(asked.stdout.strip())
