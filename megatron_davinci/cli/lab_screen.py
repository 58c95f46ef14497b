"""What a person sees while the lab's runs are trained: a table of all arms on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_davinci.lab.arms import Run
from megatron_davinci.lab.outcomes import TASK, Outcome, outcome_of
from megatron_davinci.report.numbers import NOTHING, duration

LOOK_SECONDS = 3.0
_ENDED = ("done", "failed", "stopped")


def arm_rows(outcomes: Sequence[Outcome], metric: str) -> list[list[str]]:
    """A row for each arm: runs done, at work and not begun, steps, the newest value of a metric over seeds.

    Args:
        outcomes: Of all runs, so far.
        metric: That is measured on the way.
    """
    by_arm: dict[str, list[Outcome]] = {}
    for one in outcomes:
        arm = one.run.arm
        by_arm.setdefault(f"{arm.name} at {arm.size}" if arm.size else arm.name, []).append(one)
    rows = []
    for name, each in by_arm.items():
        lost = [f"{sum(one.state == state for one in each)} {state}" for state in ("failed", "stopped")]
        steps = sum(one.step for one in each), sum(one.steps for one in each)
        # Seeds are at different places: the newest place that all of those that began have reached is compared.
        curves = [curve[1] for one in each if (curve := one.curve(metric))[1]]
        shared = min(map(len, curves), default=0)
        values = [values[shared - 1] for values in curves]
        newest = NOTHING if not values else f"{np.mean(values):.4f}"
        if len(values) > 1:
            newest += f" ± {np.std(values, ddof=1):.4f}"
        rows.append(
            [
                name,
                f"{sum(one.state == 'done' for one in each)} of {len(each)}",
                str(sum(one.state == "begun" for one in each)),
                f"{100 * steps[0] / steps[1]:.0f}%",
                newest,
                ", ".join(text for text in lost if not text.startswith("0 ")),
            ]
        )
    return rows


class Screen(AbstractContextManager["Screen"]):
    """Shows how runs go on, while it is entered.

    Args:
        root: The lab's folder.
        runs: Of the design.
        metric: That decides.
        console: Where to write.
    """

    def __init__(self, root: Path, runs: Sequence[Run], metric: str, console: Console | None = None) -> None:
        self._root, self._runs, self._metric = root, runs, metric
        self._shown = "heldout_loss.mean" if metric.startswith((TASK, "train_loss")) else metric
        self._console = console or Console(highlight=False, markup=False, emoji=False)
        self._ended: dict[str, Outcome] = {}
        self._looked, self._begun, self._table = -LOOK_SECONDS, time.monotonic(), Table()
        self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=1)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._looked = -LOOK_SECONDS
            self._live.stop()

    @property
    def say(self) -> Callable[[Outcome, int, int], None]:
        """What the runner tells of each run that has ended; a line where there is no table."""
        return (lambda outcome, done, total: None) if self._console.is_terminal else self._line

    def table(self) -> Table:
        """All arms as they are now; directories are looked at every few seconds."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked, self._table = now, self._drawn()
        return self._table

    def _drawn(self) -> Table:
        table = Table(header_style="bold", caption=f"for {duration(time.monotonic() - self._begun)}")
        for column in ("arm", "done", "at work", "steps", self._shown, ""):
            table.add_column(column, justify="left" if column in ("arm", "") else "right")
        for row in arm_rows([self._outcome(run) for run in self._runs], self._shown):
            table.add_row(*row)
        return table

    def _outcome(self, run: Run) -> Outcome:
        known = self._ended.get(run.identity)
        if known is not None and known.run is run:
            return known
        found = outcome_of(self._root, run)
        if found.state in _ENDED:
            self._ended[run.identity] = found
        return found

    def _line(self, one: Outcome, done: int, total: int) -> None:
        value: Any = one.metric(self._metric)
        said = f"{self._metric} {value:.4f}" if value is not None else one.state
        self._console.print(f"{done:4} of {total}  {one.run.label:<40} {said}", soft_wrap=True, markup=False)
