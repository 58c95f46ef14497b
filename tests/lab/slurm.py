"""A Slurm of one machine, for tests: sbatch really runs the script, srun its command, sacct says how it stands."""

import os
import stat
from pathlib import Path

SBATCH = """#!/bin/bash
jobs={jobs}
id=101
until mkdir "$jobs/$id.taken" 2> /dev/null; do id=$((id + 1)); done
cp "${{@: -1}}" "$jobs/$id.script"
export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=localhost
echo RUNNING > "$jobs/$id.state"
(
  if bash "$jobs/$id.script" > "$jobs/$id.log" 2>&1; then echo COMPLETED; else echo FAILED; fi > "$jobs/$id.end"
  mv "$jobs/$id.end" "$jobs/$id.state"
) < /dev/null > /dev/null 2>&1 &
echo "Submitted batch job $id"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for state in {jobs}/*.state; do [ -e "$state" ] && echo "$(basename "$state" .state)|$(cat "$state")|localhost"; done
exit 0
"""


def install(folder: Path) -> dict[str, str]:
    """Put it into a folder; an environment whose path begins there."""
    jobs, programs = folder / "slurm-jobs", folder / "slurm-bin"
    jobs.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        path = programs / name
        path.write_text(text.format(jobs=jobs) if "{jobs}" in text else text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
