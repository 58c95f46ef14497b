"""Where the lab's runs are trained: here, or wherever Slurm (by submitit) or Ray has room.

A job is told the design's file, the lab's folder and a run's identity, and does what the local runner does: the same
locks, the same directories, nothing that is done is done again. The folder has to be one that all machines see. Jobs
that are at work when the runner is killed go on; started again, it waits for them instead of handing them in twice.
"""

from __future__ import annotations

import importlib
import json
import os
import stat
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.files import write_json
from megatron_davinci.lab.arms import Run, arms_of, runs_of
from megatron_davinci.lab.design import load_design
from megatron_davinci.lab.outcomes import FAILED, folder_of, outcome_of, run_folder
from megatron_davinci.lab.pasts import pasts_of
from megatron_davinci.lab.runner import Executor, Trainer, trainer_of

Name = Literal["local", "slurm", "ray"]
_MINUTES = 24 * 60
_LOOK_SECONDS = 5.0
_STARTING = threading.Lock()
_BROKEN = ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL")
"""States of a job that would end so again. One that was cancelled or ran out of time goes on at the next start."""
_ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "RESIZING", "SUSPENDED")


class TrainThere:
    """What a job does. A class, so that Slurm may put it back into its queue when its time is up."""

    def __call__(self, design: str, root: str, identity: str, retry: bool) -> None:
        """Train one run of a design.

        Args:
            design: Its file.
            root: The lab's folder.
            identity: The run's.
            retry: Start it again where it failed before.

        Raises:
            ConfigError: The design has no such run any more.
        """
        try:
            self._train(Path(design), Path(root), identity, retry)
        except Exception:
            # Who waits reads it here: what the engine keeps of an error is a pickle, and none is read.
            _note_failure(run_folder(Path(root), identity), traceback.format_exc())
            raise

    def _train(self, design: Path, root: Path, identity: str, retry: bool) -> None:
        loaded = load_design(design)
        runs = runs_of(loaded, arms_of(loaded))
        for run in (*pasts_of(loaded, runs), *runs):
            if run.identity == identity:
                trainer_of(root, runs, loaded, retry).train(run)
                return
        raise ConfigError(
            "The design has no such run: it, or its data, changed since the job was handed in.",
            where=design,
            found=identity,
            do="start the lab again",
        )

    def checkpoint(self, *arguments: Any) -> Any:
        """What goes back into the queue when Slurm's time is up: the same, since a run goes on where it was."""
        submitit: Any = importlib.import_module("submitit")
        return submitit.helpers.DelayedSubmission(self, *arguments)


@dataclass(frozen=True)
class _Elsewhere(ABC):
    """Hands runs in and waits for them.

    Attributes:
        design: The design's file.
        root: The lab's folder, on a file system that all nodes see.
        retry: Start those again that failed before.
        starts: States of a run that is handed in.
        ending: Set once nobody waits any more; jobs that are handed in go on.
        settings: What the engine is told of a job, by its own names.
    """

    design: Path
    root: Path
    retry: bool
    starts: set[str]
    ending: threading.Event
    settings: Mapping[str, Any] = field(default_factory=dict)

    def train(self, run: Run) -> None:
        """Hand it in, unless it is done or at work already, and wait for its end."""
        if outcome_of(self.root, run).state in self.starts:
            error = self._error_of(run)
            if error and outcome_of(self.root, run).state not in ("done", "failed", "stopped"):
                _note_failure(folder_of(self.root, run), error)

    @abstractmethod
    def _error_of(self, run: Run) -> str:
        """Have it trained; what ended the job, if that was an error of its own."""

    def _told(self, run: Run) -> tuple[str, str, str, bool]:
        """What `TrainThere` is told."""
        return str(self.design.resolve()), str(self.root.resolve()), run.identity, self.retry


class Slurm(_Elsewhere):
    """Jobs of Slurm, by submitit. Settings are sbatch's: partition, time (minutes), gpus_per_node, ..."""

    def _error_of(self, run: Run) -> str:
        submitit = needed("submitit", "slurm")
        folder = self.root / "jobs"
        note = folder / f"{run.identity}.json"
        job = self._at_work(submitit, folder, note)
        if job is None:
            job = self._executor(submitit, folder, run).submit(TrainThere(), *self._told(run))
            write_json(note, {"job": job.job_id})
        while not job.done():
            if self.ending.wait(_LOOK_SECONDS):
                return ""
        # What the job did is in the run's directory. Of one that could not say it, Slurm knows how it ended.
        state = str(job.get_info(mode="force").get("State", ""))
        if not state.startswith(_BROKEN):
            return ""
        said = (
            job.paths.stderr.read_text(encoding="utf-8", errors="replace")
            if job.paths.stderr.exists()
            else ""
        )
        return f"{said}\nSlurm ended job {job.job_id}: {state}"

    def _at_work(self, submitit: Any, folder: Path, note: Path) -> Any:
        try:
            number = str(json.loads(note.read_text(encoding="utf-8"))["job"])
        except (OSError, ValueError, KeyError):
            return None
        job = submitit.SlurmJob(folder=folder, job_id=number)
        state = str(job.get_info(mode="force").get("State", ""))
        return job if state.startswith(_ALIVE) else None

    def _executor(self, submitit: Any, folder: Path, run: Run) -> Any:
        _own(folder)
        try:
            executor = submitit.SlurmExecutor(folder=folder)
        except RuntimeError as error:
            raise EnvironmentProblem(
                "This machine hands nothing in to Slurm.",
                found=str(error),
                do="start it on a login node of the cluster, or use --executor local",
            ) from None
        config = run.arm.config
        defaults: dict[str, Any] = {"time": _MINUTES, "cpus_per_task": max(1, config.train.threads or 1)}
        if config.parallel.device != "cpu":
            defaults["gpus_per_node"] = config.parallel.model_ranks
        try:
            executor.update_parameters(**{"job_name": f"lab-{run.identity}", **defaults, **self.settings})
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "Slurm is given a setting that it does not know.", where="--set", found=str(error)
            ) from None
        return executor


class Ray(_Elsewhere):
    """Tasks of Ray: of the cluster that RAY_ADDRESS names, or of one that is started here.

    Settings are a task's: num_cpus, num_gpus, resources, ...
    """

    def _error_of(self, run: Run) -> str:
        ray = needed("ray", "ray")
        with _STARTING:  # every run has a thread, and Ray is started once
            if not ray.is_initialized():
                ray.init(log_to_driver=False, include_dashboard=False)
        config = run.arm.config
        settings: dict[str, Any] = {"num_cpus": max(1, config.train.threads or 1), "max_retries": 0}
        if config.parallel.device != "cpu":
            settings["num_gpus"] = config.parallel.model_ranks
        try:
            task = ray.remote(**{**settings, **self.settings})(_train_there)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "Ray is given a setting that it does not know.", where="--set", found=str(error)
            ) from None
        try:
            result = task.remote(*self._told(run), os.getcwd())
            while not ray.wait([result], timeout=_LOOK_SECONDS)[0]:
                if self.ending.is_set():
                    return ""
            ray.get(result)
        except ray.exceptions.RayError as found:
            return str(found)
        return ""


def _train_there(design: str, root: str, identity: str, retry: bool, folder: str) -> None:
    """`TrainThere`, in the folder that the lab was started in: paths in configurations are relative to it."""
    os.chdir(folder)
    TrainThere()(design, root, identity, retry)


def needed(module: str, extra: str) -> Any:
    """A library that an executor rests on.

    Raises:
        EnvironmentProblem: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"The executor {extra} needs {module}, which is not installed.",
            found=str(error),
            do=f"pip install 'megatron-davinci[{extra}]', or use --executor local",
        ) from None


def executor_named(name: Name, trainer: Trainer, design: Path, settings: Mapping[str, Any]) -> Executor:
    """The executor of a name; its library is looked for before anything is handed in.

    Raises:
        EnvironmentProblem: Its library is not installed.
        ConfigError: The local one is given settings.
    """
    if name == "local":
        if settings:
            raise ConfigError(
                "The local executor has no settings.",
                where="--set",
                found=", ".join(settings),
                do="leave --set out",
            )
        return trainer
    needed({"slurm": "submitit", "ray": "ray"}[name], name)
    kind: type[Slurm] | type[Ray] = Slurm if name == "slurm" else Ray
    return kind(design, trainer.root, trainer.retry, trainer.starts, trainer.ending, settings)


def _own(folder: Path) -> None:
    """A folder that nobody else writes in: submitit hands a job its call as a pickle, which runs what it holds.

    Raises:
        ConfigError: It is there, and others may write in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            "Others may write in the folder of the jobs, and so could run what they like as you.",
            where=folder,
            found=f"mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}",
            expected=f"mode 700, owner {os.getuid()}",
            do="look through it, chmod 700 it, or give another --out",
        )


def _note_failure(folder: Path, why: str) -> None:
    """A job that ended with an error of its own, before there was a trainer that could say it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"code": 1, "why": "\n".join(why.strip().splitlines()[-12:])})
