"""Runs go to Slurm or Ray, keep their identity and locks there, and are handed in once."""

import json
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.lab.arms import arms_of, runs_of
from megatron_davinci.lab.design import load_design
from megatron_davinci.lab.executors import Slurm, TrainThere, _own, executor_named
from megatron_davinci.lab.outcomes import FAILED, folder_of, outcome_of, run_folder
from megatron_davinci.lab.runner import Trainer, carry_out
from tests.cli.screen import davinci
from tests.lab import slurm
from tests.lab.test_design import written
from tests.lab.test_runner import design_in, starts


@pytest.mark.parametrize(("name", "module"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_library_that_is_not_there_is_named_before_anything_is_handed_in(
    name, module, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem, match=f"executor {name} needs {module}") as refused:
        executor_named(name, Trainer(tmp_path), tmp_path / "design.yaml", {})
    assert f"megatron-davinci[{name}]" in str(refused.value)


def test_settings_are_for_executors_that_have_some(tmp_path):
    with pytest.raises(ConfigError, match="has no settings"):
        executor_named("local", Trainer(tmp_path), tmp_path, {"time": 1})
    path = written(tmp_path)
    for setting, why in (("time", "KEY=VALUE"), ("time=[1", "not valid YAML")):
        said = davinci("lab", "run", path, "--out", tmp_path / "lab", "--set", setting)
        assert why in said.refusal()


def test_a_job_whose_design_changed_says_so(tmp_path):
    path = written(tmp_path)
    with pytest.raises(ConfigError, match="no such run") as refused:
        TrainThere()(str(path), str(tmp_path / "lab"), "0" * 20, False)
    assert "start the lab again" in str(refused.value)
    # Who waits for the job reads why from the run's directory.
    why = json.loads((run_folder(tmp_path / "lab", "0" * 20) / FAILED).read_text())["why"]
    assert "no such run" in why


class Job:
    """A job of submitit's that has ended; whoever asks for its pickled result fails the test."""

    job_id = "7"

    def __init__(self, folder, state):
        self.state = state
        self.paths = SimpleNamespace(stderr=folder / "7_log.err", result_pickle=folder / "7_result.pkl")
        self.paths.result_pickle.write_bytes(b"not to be read")

    def done(self):
        return True

    def get_info(self, mode):
        return {"State": self.state}


@pytest.mark.parametrize(("state", "then"), [("FAILED", "failed"), ("CANCELLED by 0", "to do")])
def test_how_a_job_ended_is_read_from_slurm_and_no_pickle(state, then, tmp_path, monkeypatch):
    path = written(tmp_path)
    [run, *_] = runs_of(load_design(path))
    job, lab = Job(tmp_path, state), tmp_path / "lab"
    (tmp_path / "7_log.err").write_text("no such file: python\n")
    monkeypatch.setattr("megatron_davinci.lab.executors.needed", lambda *_: None)
    monkeypatch.setattr(Slurm, "_at_work", lambda *_: job)
    executor_named("slurm", Trainer(lab), path, {}).train(run)
    found = outcome_of(lab, run)
    assert found.state == then
    assert ("no such file: python" in found.why and "job 7: FAILED" in found.why) == (then == "failed")


def test_nobody_waits_for_a_job_once_the_lab_is_to_end(tmp_path, monkeypatch):
    path = written(tmp_path)
    [run, *_] = runs_of(load_design(path))
    job = Job(tmp_path, "RUNNING")
    job.done = lambda: False
    monkeypatch.setattr("megatron_davinci.lab.executors.needed", lambda *_: None)
    monkeypatch.setattr(Slurm, "_at_work", lambda *_: job)
    trainer = Trainer(tmp_path / "lab")
    trainer.ending.set()
    executor_named("slurm", trainer, path, {}).train(run)
    assert outcome_of(tmp_path / "lab", run).state == "to do"


def test_a_folder_of_jobs_that_others_may_write_in_is_refused(tmp_path):
    _own(tmp_path / "jobs")
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o700
    (tmp_path / "jobs").chmod(0o777)
    with pytest.raises(ConfigError, match="Others may write") as refused:
        _own(tmp_path / "jobs")
    assert "mode 777" in str(refused.value) and "chmod 700" in str(refused.value)


@pytest.mark.needs("submitit")
def test_no_slurm_here_and_settings_that_it_does_not_know(tmp_path, monkeypatch):
    path = written(tmp_path)
    [run, *_] = runs_of(load_design(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="hands nothing in to Slurm"):
        executor_named("slurm", Trainer(tmp_path / "lab"), path, {}).train(run)
    for name, value in slurm.install(tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="does not know") as refused:
        executor_named("slurm", Trainer(tmp_path / "lab"), path, {"queue": "gpu"}).train(run)
    assert "queue" in str(refused.value) and "partition" in str(refused.value)


@pytest.mark.long
@pytest.mark.needs("submitit")
def test_runs_are_trained_by_slurm_once(tmp_path, monkeypatch):
    path = design_in(tmp_path)
    out, runs = tmp_path / "lab", runs_of(load_design(path))
    environment = slurm.install(tmp_path)
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "lab", "run", str(path), "--out", str(out)]
    command += ["--executor", "slurm", "--set", "partition=cpu", "--set", "time=30"]
    # Killed as soon as its jobs are handed in: they go on, and are waited for, not handed in again.
    runner = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while len(list((out / "jobs").glob("*.json"))) < len(runs) and time.monotonic() < end:
        time.sleep(0.2)
    runner.kill()
    runner.wait()
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    scripts = sorted((tmp_path / "slurm-jobs").glob("*.script"))
    assert len(scripts) == len(runs) and "#SBATCH --partition=cpu" in scripts[0].read_text()
    assert set(starts(out, runs).values()) == {1}
    verdict = json.loads((out / "designs" / "design" / "verdict.json").read_text())
    assert verdict["comparisons"][0]["verdict"] != "refused"
    # The same runs, trained here, have the same end.
    here = carry_out(tmp_path / "here", runs[:1], parallel=1)
    assert here[0].metric("heldout_loss.mean") == outcome_of(out, runs[0]).metric("heldout_loss.mean")


@pytest.mark.long
@pytest.mark.needs("ray")
def test_runs_are_trained_by_ray(tmp_path):
    path = design_in(tmp_path, seeds=[1, 2])
    design = load_design(path)
    runs, out = runs_of(design, arms_of(design)), tmp_path / "lab"

    def executor(trainer):
        return executor_named("ray", trainer, path, {"num_cpus": 1})

    found = carry_out(out, runs, parallel=4, design=design, executor=executor)
    assert [one.state for one in found] == ["done"] * 4, found[0].why
    assert set(starts(out, runs).values()) == {1} and folder_of(out, runs[0]).is_dir()
