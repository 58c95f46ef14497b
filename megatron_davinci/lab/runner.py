"""Carrying a design out on this machine: what is done stays, what was interrupted goes on, some runs at a time.

The runner keeps nothing in memory that matters: a run is done when its directory says so. It may be killed at any
moment and started again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megatron_davinci.config import RunConfig, dump_config
from megatron_davinci.errors import AGAIN
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.lab.arms import Run
from megatron_davinci.lab.outcomes import FAILED, Outcome, folder_of, outcome_of
from megatron_davinci.platform.background_process import of_no_rank, try_lock

_LOOK_SECONDS = 2.0


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
) -> list[Outcome]:
    """Train the runs that are not done. One that fails stops no other.

    Args:
        root: The lab's folder.
        runs: Of the design.
        parallel: How many at a time.
        retry: Start those again that failed before.
        say: Is told of each that has ended, with how many are done and how many there are.

    Returns:
        The outcome of each run, in the order of `runs`.
    """
    wanted = unique(runs)
    before = {run.identity: outcome_of(root, run) for run in wanted}
    left = [
        run
        for run in wanted
        if before[run.identity].state != "done" and (retry or before[run.identity].state != "failed")
    ]
    done = len(wanted) - len(left)
    with ThreadPoolExecutor(max(1, parallel)) as pool:
        futures = {pool.submit(_train, root, run): run for run in left}
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                say(outcome_of(root, futures[future]), done, len(wanted))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return [outcome_of(root, run) for run in runs]


def configuration(root: Path, run: Run) -> RunConfig:
    """A run's configuration, with its directory."""
    config = run.arm.with_seed(run.seed)
    place = config.run.model_copy(update={"directory": folder_of(root, run)})
    return config.model_copy(update={"run": place})


def _train(root: Path, run: Run) -> None:
    (root / "locks").mkdir(parents=True, exist_ok=True)
    # The trainer holds it too, from its first moment on: a runner that was killed may have left it at work.
    while (lock := try_lock(root / "locks" / run.identity)) is None:
        time.sleep(_LOOK_SECONDS)
    try:
        if outcome_of(root, run).state != "done":
            _start(root, run, lock)
    finally:
        os.close(lock)


def _start(root: Path, run: Run, lock: int) -> None:
    folder = folder_of(root, run)
    (folder / FAILED).unlink(missing_ok=True)
    config = configuration(root, run)
    path, log = root / "configs" / f"{run.identity}.yaml", root / "logs" / f"{run.identity}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_config(config))
    ranks = config.parallel.model_ranks
    command = [sys.executable, "-m", "megatron_davinci.train", str(path)]
    if ranks > 1 or config.parallel.device != "cpu":
        command = [sys.executable, "-m", "megatron_davinci.cli.main", "train", str(path)]
    with open(log, "ab") as file:
        code = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=of_no_rank(),
            pass_fds=(lock,),
            check=False,
        ).returncode
    # What was asked to end goes on at the next start of the lab; what was killed too.
    if code > 0 and code != AGAIN and code < 128:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FAILED, {"code": code, "why": "\n".join(last)})
