"""Carrying a design out on this machine: what is done stays, what was interrupted goes on, some runs at a time.

The runner keeps nothing in memory that matters: a run is done when its directory says so. It may be killed at any
moment and started again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_davinci.config import RunConfig, dump_config
from megatron_davinci.errors import AGAIN
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.lab.arms import Run
from megatron_davinci.lab.design import Design
from megatron_davinci.lab.outcomes import FAILED, STOPPED, Outcome, folder_of, outcome_of
from megatron_davinci.lab.pasts import SHARED, origin_of, past_of, pasts_of
from megatron_davinci.lab.stopping import note, watcher
from megatron_davinci.platform.background_process import of_no_rank, try_lock

LOOK_SECONDS = 2.0
Watch = Callable[[Run], str]


def unique(runs: Sequence[Run]) -> list[Run]:
    """One of each: arms that compute the same are run once."""
    return list({run.identity: run for run in reversed(runs)}.values())[::-1]


def carry_out(
    root: Path,
    runs: Sequence[Run],
    *,
    parallel: int,
    retry: bool = False,
    say: Callable[[Outcome, int, int], None] = lambda outcome, done, total: None,
    design: Design | None = None,
    executor: Callable[[Trainer], Executor] | None = None,
) -> list[Outcome]:
    """Train the runs that are not done. One that fails stops no other.

    Args:
        root: The lab's folder.
        runs: Of the design.
        parallel: How many at a time.
        retry: Start those again that failed before.
        say: Is told of each that has ended, with how many are done and how many there are.
        design: Whose pasts are shared and whose rule stops runs early; None for neither.
        executor: Makes what trains a run elsewhere; None to train here.

    Returns:
        The outcome of each run, in the order of `runs`.
    """
    # Pasts come first: who waits for one waits for a run that is at work.
    wanted = unique([*(pasts_of(design, runs) if design else []), *runs])
    trainer = trainer_of(root, runs, design, retry)
    where = trainer if executor is None else executor(trainer)
    before = {run.identity: outcome_of(root, run) for run in wanted}
    left = [run for run in wanted if before[run.identity].state in trainer.starts]
    done = len(wanted) - len(left)
    # Here, who waits for a past waits in a thread; elsewhere it would hold a node, so pasts come first.
    first = [run for run in left if run.arm.name == SHARED and where is not trainer]
    for part in (first, [run for run in left if run not in first]):
        with ThreadPoolExecutor(max(1, parallel)) as pool:
            futures = {pool.submit(where.train, run): run for run in part}
            try:
                for future in as_completed(futures):
                    future.result()
                    done += 1
                    say(outcome_of(root, futures[future]), done, len(wanted))
            except BaseException:
                # The pool waits for its threads: those that wait for others' runs have to hear of it.
                trainer.ending.set()
                for future in futures:
                    future.cancel()
                raise
    return [outcome_of(root, run) for run in runs]


def configuration(root: Path, run: Run) -> RunConfig:
    """A run's configuration, with its directory."""
    config = run.arm.with_seed(run.seed)
    place = config.run.model_copy(update={"directory": folder_of(root, run)})
    return config.model_copy(update={"run": place})


def trainer_of(root: Path, runs: Sequence[Run], design: Design | None, retry: bool) -> Trainer:
    """What trains runs of a design on the machine that it is called on."""
    return Trainer(root, retry, design, _watch(root, runs, design))


def _watch(root: Path, runs: Sequence[Run], design: Design | None) -> Watch | None:
    if design is None or design.stop is None:
        return None
    control = runs[0].arm.name
    theirs = {(run.arm.size, run.seed): run for run in runs if run.arm.name == control}
    return watcher(root, design.stop, design.metrics[0], theirs)


class Executor(Protocol):
    """Trains one run to its end, somewhere, and comes back then."""

    def train(self, run: Run) -> None:
        """Train it, unless that is done."""


@dataclass(frozen=True)
class Trainer:
    """Trains one run of a design at a time, in a process that any machine with the lab's folder can start.

    Attributes:
        root: The lab's folder.
        retry: Start those again that failed before.
        design: Whose pasts are shared; None for none.
        watch: Says why a run should be stopped before its end; None where none may be.
        ending: Set once nothing more is to be started, as after Ctrl-C; who waits gives up.
    """

    root: Path
    retry: bool = False
    design: Design | None = None
    watch: Watch | None = None
    ending: threading.Event = field(default_factory=threading.Event, compare=False)

    @property
    def starts(self) -> set[str]:
        """States of a run that is started. A stopped one goes on where the design has no rule that stops runs."""
        return {
            "to do",
            "begun",
            *(("failed",) if self.retry else ()),
            *(("stopped",) if self.watch is None else ()),
        }

    def train(self, run: Run) -> None:
        """Train a run to its end, after the past that it begins with; what is done is left as it is."""
        root = self.root
        past = None if self.design is None or run.arm.name == SHARED else past_of(self.design, run)
        if past is not None:
            self.train(past)
            if (found := outcome_of(root, past)).state != "done":
                # A past that was asked to end, or was killed, goes on at the next start, and this run with it.
                if found.state in ("failed", "stopped"):
                    why = f"its shared past ({past.identity}) is {found.state}\n{found.why}".strip()
                    self._failed(run, 1, why)
                return
        (root / "locks").mkdir(parents=True, exist_ok=True)
        # The trainer holds it too, from its first moment on: a runner that was killed may have left it at work.
        while (lock := try_lock(root / "locks" / run.identity)) is None:
            if self.ending.wait(LOOK_SECONDS):
                return
        try:
            if outcome_of(root, run).state in self.starts and not self.ending.is_set():
                self._start(run, lock)
        finally:
            os.close(lock)

    def _start(self, run: Run, lock: int) -> None:
        root, folder = self.root, folder_of(self.root, run)
        (folder / FAILED).unlink(missing_ok=True)
        (folder / STOPPED).unlink(missing_ok=True)
        config = configuration(root, run)
        path, log = root / "configs" / f"{run.identity}.yaml", root / "logs" / f"{run.identity}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_config(config))
        ranks = config.parallel.model_ranks
        command = [sys.executable, "-m", "megatron_davinci.train", str(path)]
        if ranks > 1 or config.parallel.device != "cpu":
            command = [sys.executable, "-m", "megatron_davinci.cli.main", "train", str(path)]
        origin = run.origin if self.design is None else origin_of(self.design, root, run)
        if origin:
            command += ["--branch", origin]
        with open(log, "ab") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=of_no_rank(),
                pass_fds=(lock,),
            )
            code, why = self._wait(process, run)
        if why:
            note(root, run, why)
        # What was asked to end goes on at the next start of the lab; what was killed too.
        elif code > 0 and code != AGAIN and code < 128:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            self._failed(run, code, "\n".join(last))

    def _wait(self, process: subprocess.Popen, run: Run) -> tuple[int, str]:
        """The exit status, and why the run was asked to stop; empty where it was not."""
        if self.watch is None or run.arm.name == SHARED:
            return process.wait(), ""
        while True:
            try:
                return process.wait(LOOK_SECONDS), ""
            except subprocess.TimeoutExpired:
                if why := self.watch(run):
                    process.terminate()  # it saves what it has, should another design want it
                    return process.wait(), why

    def _failed(self, run: Run, code: int, why: str) -> None:
        folder = folder_of(self.root, run)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FAILED, {"code": code, "why": why})
