"""One recipe by the local executor, by Slurm (jobs of an array that really run, here) and by Ray: the same corpus."""

from __future__ import annotations

import os
import sys

import pytest

from megatron_davinci.darwin import on_cluster, slurm
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from tests.cases import is_long
from tests.darwin.making import SOURCES, digests, made, raw_files, recipe

SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
state = os.environ["FAKE_SLURM"]
number = len(os.listdir(state)) + 1
with open(f"{{state}}/{{number}}.sh", "w") as file:
    file.write(script)
exports = dict(each.split("=") for each in sys.argv[1].removeprefix("--export=ALL,").split(","))
last, out = re.search(r"--array=0-([0-9]+)", script)[1], re.search(r"--output=(.*)", script)[1]
run = "" if os.environ.get("FAKE_SLURM_FAILS") else "; ".join(
    f"SLURM_ARRAY_TASK_ID={{k}} SLURM_JOB_ID={{number}} bash {{state}}/{{number}}.sh "
    f"> {{out.replace('%A', str(number)).replace('%a', str(k))}} 2>&1" for k in range(int(last) + 1))
slow = "sleep 1" if number == 1 else ":"
command = f"touch {{state}}/{{number}}.on; {{slow}}; {{run or ':'}}; rm {{state}}/{{number}}.on"
process = subprocess.Popen(["bash", "-c", command], env=os.environ | exports, start_new_session=True,
                           stdout=subprocess.DEVNULL)
while not os.path.exists(f"{{state}}/{{number}}.on") and process.poll() is None:
    pass
print("Submitted batch job", number)
"""
SQUEUE = """#!{python}
import glob, os, sys
state = os.environ["FAKE_SLURM"]
[name] = [each.split("=")[1] for each in sys.argv if each.startswith("--name=")]
for job in glob.glob(f"{{state}}/*.on"):
    if f"#SBATCH --job-name={{name}}\\n" in open(job.removesuffix(".on") + ".sh").read():
        print(os.path.basename(job).removesuffix(".on"))
"""
CLUSTER = {"partition": "cpu", "time": "00:10:00", "tasks_per_job": 3, "options": {"account": "davinci"}}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of two commands, whose jobs run on this machine, one after another."""
    state, commands = tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (commands / name).write_text(text.format(python=sys.executable))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(on_cluster, "GRACE_SECONDS", 0.2)
    return state


def smaller(folder, out, **changes):
    """Three tasks; by `make test-long` a step that needs all documents too."""
    steps = ["normalise_text", {"length": {"min_characters": 3000}}, *(["exact_dedup"] if is_long() else [])]
    return recipe(folder, out, sources=SOURCES[2:], steps=steps, limits={"task_bytes": 40_000}, **changes)


@pytest.fixture
def raw(tmp_path):
    raw_files(tmp_path / "raw", documents=2)
    return tmp_path


def test_an_array_of_jobs_makes_the_same_corpus(raw, cluster):
    expected = made(smaller(raw, "here"))
    assert expected.manifest["input"]["tasks"] == 3
    corpus = made(smaller(raw, "there", slurm=CLUSTER), executor="slurm", workers=3)
    assert digests(corpus.folder) == digests(expected.folder)
    scripts = sorted(cluster.glob("*.sh"))
    assert len(scripts) == (3 if is_long() else 1)
    first = scripts[0].read_text()
    for line in (
        "--partition=cpu",
        "--time=00:10:00",
        "--array=0-0%3",
        "--mem-per-cpu=4G",
        "--account=davinci",
    ):
        assert f"#SBATCH {line}\n" in first
    assert "qos" not in first


def test_tasks_that_fail_are_said_and_executors_take_each_others_work_over(raw, cluster, monkeypatch):
    loaded = smaller(raw, "there", slurm=CLUSTER)
    monkeypatch.setenv("FAKE_SLURM_FAILS", "1")
    with pytest.raises(EnvironmentProblem, match="3 of 3 tasks have not finished"):
        made(loaded, executor="slurm")
    assert not list((raw / "there").glob("work/*/*/job"))
    assert made(loaded).counts["input"] == 6
    assert len(list(cluster.glob("*.sh"))) == 1


def test_a_job_that_a_killed_start_has_submitted_is_waited_for(raw, cluster, monkeypatch):
    loaded, launch = smaller(raw, "there", slurm=CLUSTER), slurm.SlurmExecutor.launch_job
    monkeypatch.setenv("FAKE_SLURM_FAILS", "1")

    def killed(executor):
        launch(executor)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(slurm.SlurmExecutor, "launch_job", killed)
        with pytest.raises(KeyboardInterrupt):
            made(loaded, executor="slurm")
    assert list(cluster.glob("*.on"))
    # What it may still write is not taken for what a killed run has left behind.
    assert made(loaded).counts["input"] == 6
    assert not list(cluster.glob("*.on"))


def test_all_arrays_that_the_limit_of_one_array_makes_necessary_are_waited_for(raw, cluster, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_FAILS", "1")
    loaded = smaller(raw, "there", slurm={**CLUSTER, "tasks_per_job": 1, "max_array": 1})
    with pytest.raises(EnvironmentProblem, match="3 of 3 tasks have not finished"):
        made(loaded, executor="slurm")
    # The first array is the slowest.
    assert len(list(cluster.glob("*.sh"))) == 3 and not list(cluster.glob("*.on"))


def test_what_slurm_needs_is_said(raw, cluster, monkeypatch):
    with pytest.raises(ConfigError, match="partition"):
        made(smaller(raw, "without"), executor="slurm")
    (raw / "bin" / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    with pytest.raises(EnvironmentProblem, match="refused"):
        made(smaller(raw, "refused", slurm=CLUSTER), executor="slurm")
    monkeypatch.setenv("PATH", str(raw))
    with pytest.raises(EnvironmentProblem, match="no Slurm"):
        made(smaller(raw, "nowhere", slurm=CLUSTER), executor="slurm")


@pytest.mark.long
def test_ray_makes_the_same_corpus(raw):
    ray = pytest.importorskip("ray")  # the extra `ray`
    expected = made(smaller(raw, "here"))
    settings = {"memory_gb": 0.25}
    try:
        corpus = made(smaller(raw, "there", ray=settings), executor="ray", workers=2)
        assert digests(corpus.folder) == digests(expected.folder)
        with pytest.raises(EnvironmentProblem, match="has room"):
            made(smaller(raw, "large", ray={"memory_gb": 100_000}), executor="ray")
    finally:
        ray.shutdown()
