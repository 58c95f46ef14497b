"""Runs that are killed at random, again and again, and what must hold of what becomes of them.

For `tests/faults/test_kills.py` and `benchmarks/faults.py`. A run is trained undisturbed once. The same run is then
started, killed and started again until it is done. Most starts are ranks forked from a process that has everything
imported, which then do what `python -m megatron_davinci.train` does; some are `davinci train` from its first import.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.faults import trials
from tests.ranks import start_ranks
from tests.tiny import tiny_settings

RANKS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}
FORKED = ("rank 0", "last rank", "all ranks", "save", "evaluation", "recovery", "loader worker")
LAUNCHED = ("launcher", "import")
BY_THEMSELVES_SECONDS = 2.0
"""How long what is left of a run is given to notice that a part of it was killed, before it is told to end."""
SURVIVORS_SECONDS = 20.0
"""How long it may take to end in all; what is there then is ended, and counted."""


def settings_of(
    root: Path, name: str, layout: str, *, snapshots: bool = False, short: bool = False
) -> dict[str, Any]:
    """A run of 50 steps in two stages, with dropout, data workers, evaluations, and checkpoints in the background.

    `short`: of 20 steps.
    """
    settings = tiny_settings(
        root,
        run={"directory": str(root / name), "seed": 7},
        parallel=LAYOUTS[layout],
        model={"dropout": 0.1},
        checkpoint={"every_steps": 4, "keep": 2, "keep_every": 20},
        evaluation={"every_steps": 6, "sequences": 8},
        logging={"token_digest": True},
    )
    if short:
        for stage in settings["curriculum"]:
            stage["tokens"] //= 3
    settings["data"]["loader"] = {"workers": 1, "prefetch_steps": 3}
    if snapshots:
        settings["snapshots"] = {"every_steps": 3, "keep_alive_seconds": 60}
    return settings


class Board:
    """Where each rank says what it is at, for whoever kills it: a small file that all of them map.

    Args:
        path: The file.
        make: Whether to make it.
    """

    _ENTRY = struct.Struct("<dq24s")

    def __init__(self, path: Path, *, make: bool = False) -> None:
        self.path = path
        if make:
            path.write_bytes(bytes(RANKS * self._ENTRY.size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def write(self, rank: int, entered: float, step: int, place: str) -> None:
        """Say where a rank is.

        Args:
            rank: Which.
            entered: When its program began, by the monotonic clock.
            step: The step.
            place: As the watchdog is told.
        """
        self._ENTRY.pack_into(self._memory, rank * self._ENTRY.size, entered, step, place.encode())

    def read(self, rank: int) -> tuple[float, int, str]:
        """When a rank's program began, its step and its place; all nothing before it has begun."""
        entered, step, place = self._ENTRY.unpack_from(self._memory, rank * self._ENTRY.size)
        return entered, step, place.rstrip(b"\0").decode()


def a_rank(config: str, board: str, mutant: str = "") -> None:
    """What `python -m megatron_davinci.train` does, once everything is imported; it says on a board what it is at."""
    entered, rank, seen = time.monotonic(), int(os.environ["RANK"]), Board(Path(board))
    seen.write(rank, entered, 0, "start")
    said = os.open(f"{board}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from megatron_davinci.cli.train import main
    from megatron_davinci.train.signals import WATCH
    from megatron_davinci.train.watchdog import Watchdog
    from tests.faults.mutants import apply

    apply(mutant)
    beat = Watchdog.beat

    def told(self: Watchdog, place: str, step: int) -> None:
        seen.write(rank, entered, step, place)
        beat(self, place, step)

    Watchdog.beat = told  # type: ignore[method-assign]
    sys.argv = ["train", config]
    WATCH.install()
    main()


def an_export(run: str, out: str) -> None:
    """What `davinci convert to-hf RUN OUT` does."""
    from megatron_davinci.cli.main import main

    sys.argv = ["davinci", "convert", "to-hf", run, out, "--skip-verify"]
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    code = main()
    if code:
        os._exit(code)


# ---- what a run has on record ---------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a record."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(run: Path) -> list[tuple[Any, ...]]:
    """What each step on record was, to the bit."""
    names = ("step", "consumed_samples", "loss", "grad_norm", "learning_rate", "token_digest")
    return [tuple(line[name] for name in names) for line in lines(run / "metrics.jsonl")]


def evaluations_of(run: Path) -> list[tuple[int, Any]]:
    """Held-out losses, to the bit."""
    return [(line["step"], line["heldout_loss"]) for line in lines(run / "evals.jsonl")]


def starts_of(run: Path) -> list[int]:
    """The step that each start went on from."""
    try:
        return [start["step"] for start in json.loads((run / "manifest.json").read_text())["starts"]]
    except FileNotFoundError:
        return []


def state_of(run: Path) -> dict[str, str]:
    """Digests of the weights and the optimizer's state in the newest checkpoint."""
    newest = trials.visible(run / "checkpoints")[0]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def weights_of(export: Path) -> dict[str, str]:
    """Digests of the weights of an export."""
    return {name: digest for name, digest in trials.content(export).items() if "safetensors" in name}


def expected_digests(settings: dict[str, Any]) -> list[tuple[int, int, str]]:
    """First sample, batch and token digest of each step, read anew by sample number, one at a time."""
    import numpy as np

    from megatron_davinci.config import validate
    from megatron_davinci.data import Batches
    from megatron_davinci.data.token_digest import token_digest
    from megatron_davinci.train.forecast import Forecast

    forecast = Forecast.read(validate(settings, where="tests/faults/kills.py"))
    batches, found, first = Batches(forecast.curriculum, forecast.sources), [], 0
    while first < forecast.schedule.total_samples:
        size = forecast.schedule.at(first).batch
        numbers = np.arange(first, first + size)
        found.append((first, size, token_digest(numbers, batches.read(numbers).tokens)))
        first += size
    return found


# ---- a start, and its end -------------------------------------------------------------------------------------


class Attempt:
    """A start of a run.

    Args:
        root: Where the run's folder is.
        settings: Of the run.
        launched: By `davinci train` and not by a fork.
        mutant: What the forked ranks do wrongly.
    """

    def __init__(
        self, root: Path, settings: dict[str, Any], *, launched: bool = False, mutant: str = ""
    ) -> None:
        self.run = Path(settings["run"]["directory"])
        self.before = starts_of(self.run)
        config = root / f"{self.run.name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        self.board = Board(root / f"{self.run.name}.board", make=True)
        self.began = time.monotonic()
        self.first_step_at: float | None = None
        self.launcher: subprocess.Popen[bytes] | None = None
        self._forked: list[tuple[Any, Any]] = []
        self._ranks: dict[int, psutil.Process] = {}
        if launched:
            from tests.examples.cluster import outside

            with open(f"{self.board.path}.log", "ab") as log:
                self.launcher = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "megatron_davinci.cli.main",
                        "train",
                        str(config),
                        "--ranks",
                        str(RANKS),
                    ],
                    stdout=log,
                    stderr=log,
                    env=outside(),
                    start_new_session=True,
                )
        else:
            self._forked = start_ranks(RANKS, a_rank, str(config), str(self.board.path), mutant, parents=True)
            self._ranks = {n: psutil.Process(process.pid) for n, (process, _) in enumerate(self._forked)}

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that there are."""
        if self.launcher is not None and len(self._ranks) < RANKS:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self.launcher.pid).children():
                    if "megatron_davinci.train" in " ".join(child.cmdline()):
                        self._ranks[int(child.environ()["RANK"])] = child
        return self._ranks

    @property
    def step(self) -> int | None:
        """The last step on record that this start took; None before it has taken one."""
        starts = starts_of(self.run)
        if len(starts) == len(self.before):
            return None
        if self.launcher is None and self.board.read(0)[2] == "start":
            return None  # it has not yet dropped the steps that it takes again
        done = lines(self.run / "metrics.jsonl")
        last = done[-1]["step"] if done else 0
        return last if last > starts[-1] else None

    def look(self) -> bool:
        """Note when the first step came; whether all of it runs."""
        if self.first_step_at is None and self.step is not None:
            self.first_step_at = time.monotonic()
        if self.launcher is not None:
            return self.launcher.poll() is None
        return all(process.exitcode is None for process, _ in self._forked)

    def wait(self, ready: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Wait for something; whether it came before this start ended or was over."""
        end = time.monotonic() + seconds
        while self.look():
            if ready():
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return False

    def end(self, seconds: float, *, alone: float | None = None) -> tuple[bool, bool]:
        """Wait until nothing of it is left, and end what is left then.

        Args:
            seconds: How long.
            alone: After so many of them, ranks that were forked are told to end, as their launcher would tell them
                at once; None for never.

        Returns:
            Whether all of it ended by itself, and whether it ended without being killed.
        """
        self.ranks()
        left = list(self._ranks.values())
        if self.launcher is not None and self.launcher.poll() is None:
            left.append(psutil.Process(self.launcher.pid))
        began, told = time.monotonic(), False
        while time.monotonic() < began + seconds and any(runs(one) for one in left):
            self.look()
            if self.launcher is not None:
                self.launcher.poll()
            for process, _ in self._forked:
                process.join(0)
            if self._forked and alone is not None and not told and time.monotonic() > began + alone:
                told = True
                for one in left:
                    with contextlib.suppress(psutil.Error):
                        one.send_signal(signal.SIGQUIT)
            time.sleep(0.01)
        hung = [one for one in left if runs(one)]
        for one in hung:
            with contextlib.suppress(psutil.Error):
                one.kill()
        for process, connection in self._forked:
            process.join()
            connection.close()
        if self.launcher is not None:
            self.launcher.wait()
        return not told and not hung, not hung

    def code(self) -> int | None:
        """The exit code of rank 0 or the launcher, once it has ended."""
        return self.launcher.returncode if self.launcher is not None else self._forked[0][0].exitcode


def runs(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
