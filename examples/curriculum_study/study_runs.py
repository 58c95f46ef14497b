"""The runs of the study: what each is started with, which are done, and how they are trained, some at a time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from arms import Arm, Change, as_override

from megatron_davinci.config import RunConfig, dump_config, load_config
from megatron_davinci.errors import ConfigError, DavinciError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.edits import EditFile, Point
from megatron_davinci.train.planned import boundary_from
from megatron_davinci.train.run_directory import RunDirectory, read_lines


@cache
def _loaded(path: Path, overrides: tuple[str, ...]) -> RunConfig:
    return load_config(path, overrides)


@dataclass(frozen=True)
class Study:
    """What all runs have in common.

    Attributes:
        config: The configuration file.
        out: The study's folder: data, runs, page.
        overrides: `key=value` settings for every run.
    """

    config: Path
    out: Path
    overrides: tuple[str, ...] = ()

    def data_overrides(self) -> list[str]:
        """Where this study's data lies."""
        found = [f"data.tokenizer={self.out / 'data' / 'tokenizer'}"]
        for domain in _loaded(self.config, ()).data.validation:
            found.append(f"data.sources.{domain}.path={self.out / 'data' / f'{domain}.train'}")
            found.append(f"data.validation.{domain}={self.out / 'data' / f'{domain}.valid'}")
        return found

    def base(self) -> RunConfig:
        """The configuration of the controller's arm."""
        return _loaded(self.config, (*self.data_overrides(), *self.overrides))


@dataclass(frozen=True)
class Run:
    """An arm with a seed.

    Attributes:
        study: What all have in common.
        arm: The arm.
        seed: Of weights and data order.
        changes: What is asked for in mid-run, by `davinci curriculum edit`'s own way.
    """

    study: Study
    arm: Arm
    seed: int
    changes: tuple[Change, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm.name.replace(', ', '-').replace(' ', '-')}-seed{self.seed}"

    @property
    def directory(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.study.out / "runs" / self.name)

    def overrides(self) -> list[str]:
        """The settings that make it of the study's configuration."""
        stages = range(len(self.study.base().curriculum))
        return [
            *self.study.data_overrides(),
            *self.study.overrides,
            f"run.directory={self.directory.path}",
            f"run.seed={self.seed}",
            *(f"curriculum.{stage}.mixture={as_override(self.arm.mixture)}" for stage in stages),
            *([] if self.arm.kind == "controller" else ["controller.mode=off"]),
        ]

    def config(self) -> RunConfig:
        """Its configuration."""
        return _loaded(self.study.config, tuple(self.overrides()))

    def is_done(self) -> bool:
        """Whether it was trained to its end.

        Raises:
            ConfigError: It was, or was begun, with other settings.
        """
        recorded = self.directory.path / "config.yaml"
        if not recorded.exists():
            return False
        config = self.config()
        # The text first: reading YAML takes a fifth of a second.
        same = recorded.read_text(encoding="utf-8") == dump_config(config) or load_config(recorded) == config
        if not same or not self._asked_the_same():
            raise ConfigError(
                "A run of the study was made with other settings.",
                where=self.directory.path,
                expected="the settings of now: every run of a study must have the same",
                do="remove the folder, or give another --out",
            )
        evaluations = read_lines(self.directory.evaluations)
        schedule = Schedule(config.curriculum, config.data.sequence_length)
        return bool(evaluations) and evaluations[-1]["consumed_samples"] >= schedule.total_samples

    def all_changes(self) -> list[Change]:
        """Changes in mid-run, the second half of the arm's own among them."""
        if self.arm.second is None:
            return list(self.changes)
        config = self.config()
        schedule = Schedule(config.curriculum, config.data.sequence_length)
        half = boundary_from(schedule, schedule.total_samples // 2)
        return [*self.changes, Change(half or 0, self.arm.second, f"the second half of {self.arm.name}")]

    def ask(self) -> None:
        """Write what is to change in mid-run, so that the run finds it when it starts."""
        changes = self.all_changes()
        if not changes or self.directory.edits.exists():
            return
        self.directory.path.mkdir(parents=True, exist_ok=True)
        file = EditFile(self.directory.edits)
        for change in changes:
            weights = {name: str(share) for name, share in change.mixture.items()}
            file.add(
                Point(sample=change.sample), weights, change.reason, asked=f"--at sample {change.sample}"
            )

    def _asked_the_same(self) -> bool:
        asked = EditFile(self.directory.edits).read().asked
        return [(edit.point.sample, dict(edit.weights)) for edit in asked] == [
            (change.sample, {name: str(share) for name, share in change.mixture.items()})
            for change in self.all_changes()
        ]


Trainer = Callable[[Sequence[Run]], None]
"""Trains runs that are not done."""


def train_missing(runs: Sequence[Run], train: Trainer) -> None:
    """Train those of `runs` that are not done, and make sure that all are then.

    Raises:
        DavinciError: One is not.
    """
    missing = [run for run in runs if not run.is_done()]
    for run in missing:
        run.ask()
    if missing:
        train(missing)
    if left := [run.name for run in missing if not run.is_done()]:
        raise DavinciError("Runs of the study did not come to their end.", found=", ".join(left))


class Processes:
    """Trains with `python -m megatron_davinci.train`, several runs at a time, each on one core.

    Args:
        parallel: How many at a time.
        total: Runs of the whole study, for the count that is shown.
        done: Those of them that were done before.
        say: Told when one has ended.
    """

    def __init__(self, parallel: int, total: int, done: int, say: Callable[[str], None] = print) -> None:
        self._parallel, self._total, self._done, self._say = parallel, total, done, say
        self._begin, self._before = time.perf_counter(), done

    def __call__(self, runs: Sequence[Run]) -> None:
        """Train them.

        Raises:
            DavinciError: One failed; those that were at work are waited for, the others not begun.
        """
        with ThreadPoolExecutor(self._parallel) as pool:
            futures = {pool.submit(self._train, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    future.result()
                    self._tell(futures[future])
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _train(self, run: Run) -> None:
        log = run.study.out / "logs" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # What torchrun starts on each rank; alone it is a run of one rank, and starts in half the time.
        command = [sys.executable, "-m", "megatron_davinci.train", str(run.study.config), *run.overrides()]
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise DavinciError(
                f"The run {run.name} stopped.",
                where=log,
                found=f"exit code {code}\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:]),
                do="mend what it says, then start the study again: runs that are done are kept",
            )

    def _tell(self, run: Run) -> None:
        self._done += 1
        seconds = time.perf_counter() - self._begin
        left = seconds / max(self._done - self._before, 1) * (self._total - self._done)
        loss = mean_loss(read_lines(run.directory.evaluations)[-1])
        self._say(
            f"{self._done:3} of {self._total}  {run.name:<24} mean held-out loss {loss:.4f}   "
            f"{seconds / 60:.1f} min, about {left / 60:.0f} min left"
        )


def mean_loss(evaluation: dict[str, Any]) -> float:
    """The goal: held-out loss, nats a token, as the plain mean over the domains."""
    losses = evaluation["heldout_loss"]
    return float(sum(losses.values()) / len(losses))
