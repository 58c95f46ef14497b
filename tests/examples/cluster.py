"""A cluster on this machine: stand-ins for Slurm's commands, and nodes that can be killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "davinci_3b"

# Both nodes are this machine. What is put back into the queue is written down, for the test to start again.
SCONTROL = """#!/usr/bin/env bash
set -euo pipefail
case $1 in
  show) for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do echo 127.0.0.1; done ;;
  requeue) echo "$2" >> "$FAKE_SLURM/requeued" ;;
esac
"""

# One task a node, with the exit code that srun has: the highest of the tasks'. FAKE_SRUN replaces the task.
SRUN = """#!/usr/bin/env bash
set -uo pipefail
while [[ ${1:-} == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  echo "$1" >> "$FAKE_SLURM/srun"
  shift
done
if [[ -n ${FAKE_SRUN:-} ]]; then
  exec bash -c "$FAKE_SRUN"
fi
pids=()
heard=0
trap 'heard=$((heard + 1)); kill -USR1 "${pids[@]}"' USR1
for ((n = 0; n < tasks; n++)); do
  SLURM_PROCID=$n "$@" > "$FAKE_SLURM/node-$n.log" 2>&1 &
  pids+=($!)
  echo $! > "$FAKE_SLURM/node-$n.pid"
done
highest=0
for pid in "${pids[@]}"; do
  while :; do
    before=$heard
    wait "$pid"
    code=$?
    ((heard != before)) || break
  done
  if ((code > highest)); then highest=$code; fi
done
exit "$highest"
"""


class Cluster:
    """Slurm as far as `slurm.sbatch` knows it, with every node on this machine.

    Args:
        folder: Where the stand-ins and what they saw are kept.
        nodes: Nodes of the job.
        settings: Environment variables of the one who calls sbatch.
    """

    def __init__(self, folder: Path, nodes: int = 2, **settings: str) -> None:
        self.folder = folder
        self.starts = 0
        self._jobs: list[subprocess.Popen[str]] = []
        commands = folder / "bin"
        commands.mkdir(parents=True)
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.environment = {
            **outside(),
            "PATH": f"{commands}:{os.environ['PATH']}",
            "FAKE_SLURM": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            # A port that no other run of these tests is likely to use: slurm.sbatch derives it from the job's number.
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            **settings,
        }

    def sbatch(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the job, or start it again: Slurm counts, and runs a copy of the script from elsewhere."""
        copy = self.folder / "slurm_script"
        copy.write_text((SCRIPTS / "slurm.sbatch").read_text(encoding="utf-8"))
        environment = dict(self.environment)
        if self.starts:
            environment["SLURM_RESTART_COUNT"] = str(self.starts)
        self.starts += 1
        job = subprocess.Popen(
            ["bash", str(copy), *arguments],
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._jobs.append(job)
        return job

    def end(self) -> None:
        """End what still runs, after a test that failed midway."""
        for job in self._jobs:
            if job.poll() is None:
                left = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            job.communicate()

    @property
    def requeued(self) -> list[str]:
        """Numbers of the jobs that were put back into the queue."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def log(self, node: int) -> str:
        """What a node of the last start has said."""
        return (self.folder / f"node-{node}.log").read_text(encoding="utf-8")

    def kill(self, node: int) -> None:
        """A node loses its power: its torchrun and its ranks end at once, by SIGKILL."""
        agent = psutil.Process(int((self.folder / f"node-{node}.pid").read_text()))
        ranks = agent.children(recursive=True)
        assert ranks, "the node has no ranks yet"
        for process in (agent, *ranks):
            process.kill()


def outside(**settings: str) -> dict[str, str]:
    """This process's environment without what a launcher or a user may have set, and with `settings`."""
    ours = ("SLURM_", "NCCL_", "GLOO_", "TORCH", "MASTER_")
    names = {
        "NNODES",
        "HEAD",
        "PORT",
        "RUN_ID",
        "INTERFACE",
        "LOCAL_ADDR",
        "DEVICE",
        "RANKS_PER_NODE",
        "PYTHON",
    }
    names |= {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "JOIN_TIMEOUT",
        "MAX_RESTARTS",
        "REQUEUE_AFTER",
        "CONTAINER_COMMAND",
        "DAVINCI_ROOT",
    }
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(ours)}
    return {**kept, "PYTHON": sys.executable, **settings}


def finish(job: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """Wait for a job; its exit code and its log."""
    said, _ = job.communicate(timeout=seconds)
    return job.returncode, said


def wait_until(true: Callable[[], bool], job: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait until `true()`; fail when the job ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not true():
        assert job.poll() is None, f"the job ended first:\n{finish(job)[1]}"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.02)
