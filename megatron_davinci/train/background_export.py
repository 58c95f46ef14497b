"""Exports to Hugging Face while training goes on, from checkpoints that are on the disk.

A checkpoint whose step is due is linked to when it has been committed, and a process of the lowest priority makes the
export of it. One export is made at a time and one waits, so that the disk holds two checkpoints more than are kept,
at the most. Where a third comes, it takes the place of the one that waits; that is made up for when there is time, if
its checkpoint is still kept then. Nothing that happens to an export stops a run; all of it is in `exports.jsonl`.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread
from types import TracebackType
from typing import Any

from megatron_davinci.config import RunConfig
from megatron_davinci.convert import resumable
from megatron_davinci.convert.origin import is_of_another
from megatron_davinci.errors import DavinciError, EnvironmentProblem, Stopped
from megatron_davinci.files import free_bytes
from megatron_davinci.platform.background_process import BackgroundProcess, try_lock
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.export_job import ExportJob
from megatron_davinci.train.run_directory import RunDirectory, append_line
from megatron_davinci.train.signals import WATCH, signal_name

_LINKS = re.compile(r"\.step-(\d{8,})\.export")
_LOCK = ".exporting"
_LOOK_SECONDS = 1.0
_END_SECONDS = 5.0


class BackgroundExport:
    """Makes the exports of a run, on a thread of rank 0; on other ranks it does nothing.

    As a context it ends what is being exported when the block fails. After a block that went well, `finish` waits.

    Args:
        config: The run configuration.
        directory: The run directory.
        last_step: The step that this start of the run ends with; it is due whatever `every` says.
        is_main: Whether this is rank 0.
    """

    def __init__(
        self, config: RunConfig, directory: RunDirectory, last_step: int, *, is_main: bool = True
    ) -> None:
        self._config = config.checkpoint.export_hf if is_main else None
        self._directory, self._last_step = directory, last_step
        self._weights = config.model.parameters() * (2 if config.train.precision == "bf16" else 4)
        self._said: deque[str] = deque()
        self._thread: Thread | None = None
        self._changed = Condition()  # guards what follows
        self._next: ExportJob | None = None
        self._missed: set[int] = set()
        self._at_work: ExportJob | None = None
        self._process: BackgroundProcess | None = None
        self._given_up = ""  # why the one at work is to end
        self._paused = self._closing = self._ending = False

    def __enter__(self) -> BackgroundExport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close()

    # ---- what the run says to it ---------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Start, and take up what an earlier start of the run has left undone.

        Args:
            step: What the run goes on from. Later checkpoints are not its own.
        """
        if self._config is None:
            return
        checkpoints = self._directory.checkpoints
        for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
            if match := _LINKS.fullmatch(folder.name):
                job = self._job(int(match[1]))
                if job.is_linked and job.step <= step and _is_missing(job):
                    self._missed.add(job.step)
                else:
                    job.unlink()
        for folder in checkpoint_files.steps(checkpoints):
            job = self._job(checkpoint_files.step_of(folder))
            if job.step <= step and self._is_due(job.step) and _is_missing(job):
                self._missed.add(job.step)
        if self._missed:
            steps = ", ".join(f"{one:,}" for one in sorted(self._missed))
            self._said.append(
                f"Exports of earlier steps that are missing: {steps}. They are made in the background."
            )
        self._thread = Thread(target=self._work, name="exports", daemon=True)
        self._thread.start()

    def saved(self, step: int) -> None:
        """A checkpoint is on the disk; from any thread, before another one can be saved.

        Args:
            step: Its step.
        """
        if self._config is None:
            return
        with self._changed:
            self._paused = False
            if self._is_due(step) and not self._closing:
                self._due(self._job(step))
            self._changed.notify_all()

    def ends(self, step: int) -> None:
        """The run ends with a step that is on the disk, be it because steps behind it were passed over."""
        if self._config is None or step == self._last_step:
            return
        with self._changed:
            self._last_step, job = step, self._job(step)
            known = self._at_work, self._next
            if step and not self._closing and job not in known and _is_missing(job):
                self._due(job)
            self._changed.notify_all()

    def _due(self, job: ExportJob) -> None:
        if self._at_work is not None and self._at_work.step == job.step:
            # The run has turned back and taken the step again: what is being exported is no part of its past now.
            self._give_up("the step was saved anew")
            return
        try:
            job.link()
        except OSError as error:
            self._tell("export_failed", job, error=str(error))
            return
        if self._next is not None and self._next.step != job.step:
            self._put_off(self._next)
        self._missed.discard(job.step)
        self._next = job

    def save_failed(self) -> None:
        """A checkpoint could not be saved: exports give back what space they hold until one can."""
        if self._config is None:
            return
        with self._changed:
            self._paused = True
            if self._next is not None:
                self._put_off(self._next)
                self._next = None
            self._give_up("a checkpoint could not be saved, and may need the space")

    def told(self) -> list[str]:
        """Lines for whoever watches the run, of what has ended since this was asked last. Costs nothing."""
        found = []
        while self._said:
            found.append(self._said.popleft())
        return found

    def close(self) -> None:
        """End what is being exported. The run's next start goes on with it."""
        with self._changed:
            self._closing = True
            self._give_up("the run has ended")
        if self._thread is None:
            return
        self._thread.join(_END_SECONDS)
        with self._changed:
            if self._process is not None:
                self._process.end(at_once=True)
        self._thread.join()

    def finish(self, say: Callable[[str], Any]) -> None:
        """Wait for all exports that can still be made, the last checkpoint's first.

        Args:
            say: Is given lines for whoever watches the run.

        Raises:
            Stopped: A signal has asked for the end first. What was at work is left to the run's next start.
        """
        if self._thread is None:
            return
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            begun = [job.step for job in (self._at_work, self._next) if job is not None]
            left = sorted({*begun, *self._missed})
        if left:
            steps = ", ".join(f"{one:,}" for one in left)
            say(
                f"Waiting for the export of step {steps}. A signal (Ctrl-C) leaves it to the run's next start."
            )
        while self._thread.is_alive():
            self._thread.join(0.1)
            if WATCH.late:
                self.close()
                raise Stopped(
                    f"{signal_name(WATCH.late)} was heard while the last exports were being made; the run is "
                    "complete and saved.",
                    do=f"start the same command again, or: {self._job(left[-1]).by_hand}" if left else None,
                )
        for line in self.told():
            say(line)

    # ---- the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._take()) is not None:
            lock = None
            try:
                lock = self._wait_for_lock(job)
                if lock is not None and self._is_wanted(job):
                    self._export(job, lock)
            except Exception as error:  # whatever it is, the run goes on without this export
                job.unlink()
                self._tell("export_failed", job, error=f"{type(error).__name__}: {error}")
            finally:
                if lock is not None:
                    os.close(lock)
                with self._changed:
                    self._at_work = None

    def _take(self) -> ExportJob | None:
        """The next one to make; None at the end."""
        with self._changed:
            while not self._closing:
                self._given_up = ""
                if self._next is not None:
                    self._at_work, self._next = self._next, None
                    return self._at_work
                if self._missed and not self._paused:
                    job = self._job(max(self._missed))
                    self._missed.discard(job.step)
                    if self._is_there(job):
                        self._at_work = job
                        return job
                elif self._ending:
                    return None
                else:
                    self._changed.wait()
        return None

    def _is_there(self, job: ExportJob) -> bool:
        """Whether the checkpoint of one that was put off is linked to, or can be."""
        if job.is_linked:
            return True
        try:
            job.link()
        except OSError:
            self._tell("export_skipped", job, error="its checkpoint was pruned before its turn came")
            return False
        return True

    def _wait_for_lock(self, job: ExportJob) -> int | None:
        """Be the only export of the run; None where the run ends first. Another start's may be at work still."""
        job.out.parent.mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(job.out.with_name(_LOCK))) is None:
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)
                if self._closing:
                    return None
        return lock

    def _is_wanted(self, job: ExportJob) -> bool:
        """Whether there is no such export yet, and room for one."""
        manifest = checkpoint_files.read(job.source, verify=False).manifest
        if job.out.exists():
            if not is_of_another(job.out, manifest):
                job.unlink()
                self._tell("exported", job, bytes=job.size())
                return False
            aside = checkpoint_files.set_aside(job.out, "replaced")
            self._said.append(f"Step {job.step:,} was saved anew; its earlier export is now {aside}.")
        need = self._weights + sum(entry["bytes"] for entry in manifest["files"].values())
        if (free := free_bytes(job.out)) >= need:
            return True
        job.unlink()
        self._tell(
            "export_skipped",
            job,
            error=f"{free / 1e9:.3g} GB are free; it and the next checkpoint take about {need / 1e9:.3g} GB",
        )
        return False

    def _export(self, job: ExportJob, lock: int) -> None:
        assert self._config is not None
        began, code = time.monotonic(), -1
        with self._changed:
            if not self._given_up:
                self._process = BackgroundProcess(job.command(self._config), job.log, lock)
        if self._process is not None:
            code = self._process.wait()
        with self._changed:
            self._process, given_up = None, self._given_up
        seconds = round(time.monotonic() - began, 3)
        if code == 0:
            job.unlink()
            self._tell("exported", job, seconds=seconds, bytes=job.size())
            return
        if not given_up or not self._closing:
            # They would take space that the next checkpoint may need; another start goes on with what it finds.
            job.unlink()
            resumable.discard(job.out)
        if given_up:
            with self._changed:
                self._missed.add(job.step)
        event, error = ("export_interrupted", given_up) if given_up else ("export_failed", job.failure(code))
        self._tell(event, job, seconds=seconds, error=error)

    # ---- parts -----------------------------------------------------------------------------------------------

    def _job(self, step: int) -> ExportJob:
        return ExportJob(self._directory.path, step)

    def _is_due(self, step: int) -> bool:
        assert self._config is not None
        return step == self._last_step or (self._config.every is not None and step % self._config.every == 0)

    def _put_off(self, job: ExportJob) -> None:
        job.unlink()
        self._missed.add(job.step)

    def _give_up(self, why: str) -> None:
        """End the one at work, if there is one; the thread that waits for it does the rest."""
        self._given_up = why
        if self._process is not None:
            self._process.end()
        self._changed.notify_all()

    def _tell(self, event: str, job: ExportJob, **more: Any) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": job.step, "event": event}
        # A disk that is full has no room for this either.
        with suppress(EnvironmentProblem):
            append_line(self._directory.exports, {**line, **more})
        if event == "exported":
            self._said.append(f"Step {job.step:,} is exported: {job.out}")
            return
        error = " ".join(str(more.get("error", "")).split())
        log = f" More in {job.log}." if event == "export_failed" and job.log.exists() else ""
        self._said.append(
            f"Warning: {event}: step {job.step:,} is not in {job.out.parent}: {error}.{log} By hand: {job.by_hand}"
        )


def _is_missing(job: ExportJob) -> bool:
    """Whether there is no export of a job's checkpoint, but one of another of the same step, or none."""
    if not job.out.exists():
        return True
    try:
        return is_of_another(job.out, checkpoint_files.read(job.source, verify=False).manifest)
    except DavinciError:
        return False
