"""What `davinci eval` shows: how far it is, and what the tasks came to."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_davinci.cli.screen import Screen
from megatron_davinci.evaluate.naming import format_of, generated, stem_of

if TYPE_CHECKING:
    from megatron_davinci.evaluate.tasks import TaskResult
    from megatron_davinci.stats.formats import FormatSpread


class Told:
    """Is told requests done, and which task they are of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar = progress.add_task("", total=None)

    def task(self, name: str) -> None:
        """Another task begins."""
        self._progress.reset(self._bar, description=name, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Requests done, and in all."""
        self._progress.update(self._bar, completed=done, total=total)


@contextmanager
def progress() -> Iterator[Told]:
    """A bar on a terminal, nothing elsewhere."""
    # Not `sys.stderr`: what lm-eval and datasets write there is kept from it.
    screen = Console(file=sys.__stderr__)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as shown:
        yield Told(shown)


def show(results: Sequence[TaskResult], out: Path | None) -> None:
    """Print a table of metrics, then what went wrong, by task."""
    screen = Screen()
    rows = []
    for result in results:
        if format_of(result.task) is not None:
            continue  # in a table of its own
        for one in (result, *(result.tasks if result.tasks else ())):
            # The column beside it says how it was asked.
            name = one.task.removesuffix(f"_{one.protocol}")
            name = name if one is result else f"  {name}"
            for metric, value in one.metrics.items():
                error = one.errors.get(metric)
                shots = "" if one.shots is None else str(one.shots)
                rows.append(
                    [
                        name,
                        one.protocol or "",
                        shots,
                        f"{one.items:,}",
                        f"{value:.4f}",
                        "" if error is None or error != error else f"± {error:.4f}",
                        metric.removesuffix(",none"),
                    ]
                )
                name = ""
    if rows:
        screen.table(
            "",
            [
                ("task", "left"),
                ("protocol", "left"),
                ("shots", "right"),
                ("items", "right"),
                ("value", "right"),
                ("", "left"),
                ("metric", "left"),
            ],
            rows,
        )
    for result in results:
        for one in result.tasks or [result]:
            if one.problem is None and one.troubles:
                said = ", ".join(
                    f"{count} of {one.items} items: {kind}" for kind, count in one.troubles.items()
                )
                screen.console.print(f"{screen.safe(one.task)}: {said}")
    for result in results:
        if result.problem:
            print(f"error: {result.task} has no result: {result.problem}", file=sys.stderr)
    if out is not None:
        screen.console.print(f"kept in {screen.safe(out)}", style="dim")


def side_by_side(results: Sequence[TaskResult]) -> None:
    """Print, for tasks that were asked in both ways, what came out of either, item by item."""
    by_name = {result.task: result for result in results}
    rows = []
    for name, likelihood in by_name.items():
        stem = stem_of(name)
        generation = by_name.get(generated(stem))
        if generation is None or not (likelihood.metrics and generation.metrics):
            continue
        if likelihood is generation or format_of(name) is not None:
            continue
        one, other = item_scores(likelihood, "acc"), item_scores(generation, "exact_match")
        if len(one) != len(other):
            continue
        apart, error = paired_difference(one, other)
        both = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
        around = "" if error != error else f"± {error:.4f}"
        mean = f"{sum(one) / len(one):.4f}", f"{sum(other) / len(other):.4f}"
        rows.append([stem, f"{len(one):,}", *mean, f"{apart:+.4f}", around, f"{both:.0%}"])
    if rows:
        Screen().table(
            "in both ways",
            [
                ("task", "left"),
                ("items", "right"),
                ("likelihood", "right"),
                ("generation", "right"),
                ("difference", "right"),
                ("", "left"),
                ("same verdict", "right"),
            ],
            rows,
        )


def item_scores(result: TaskResult, metric: str) -> list[float]:
    """Of each item, in the order of a group's tasks; empty where a task has no such metric."""
    rows = [row for of in result.samples.values() for row in of]
    return [float(row[metric]) for row in rows] if all(metric in row for row in rows) else []


def format_table(results: Sequence[TaskResult]) -> None:
    """Print, for tasks that were asked in several formats, what the formats do beside the noise of items."""
    from megatron_davinci.stats.formats import format_spread

    groups: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result.protocol == "likelihood" and result.metrics and (scores := item_scores(result, "acc")):
            groups.setdefault(stem_of(result.task), {})[format_of(result.task) or AS_IT_IS] = scores
    rows = []
    for name, by_format in groups.items():
        items = {len(scores) for scores in by_format.values()}
        if len(by_format) > 1 and len(items) == 1 and items != {1}:
            rows.append(format_row(name, by_format, format_spread(list(by_format.values()))))
    if rows:
        Screen().table("in several formats", FORMAT_COLUMNS, rows)


FORMAT_COLUMNS: list[tuple[str, Any]] = [
    ("task", "left"),
    ("items", "right"),
    ("formats", "right"),
    ("lowest", "left"),
    ("highest", "left"),
    ("deviation", "right"),
    ("beyond noise", "right"),
    ("item error", "right"),
    ("p", "left"),
]
AS_IT_IS = "as it is"


def format_row(name: str, formats: Collection[str], spread: FormatSpread) -> list[str]:
    """A row of the table of formats."""
    ordered = sorted(zip(spread.means, formats, strict=True))
    ends = [f"{mean:.4f} {form}" for mean, form in (ordered[0], ordered[-1])]
    spreads = (spread.deviation, spread.beyond_noise, spread.item_error)
    return [
        name,
        f"{spread.items:,}",
        str(len(formats)),
        *ends,
        *(f"{x:.4f}" for x in spreads),
        f"{spread.p:.2g}",
    ]


def paired_difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of `other - one` over the same items, and its standard error (Miller, arXiv 2411.00640, section 3)."""
    apart = [b - a for a, b in zip(one, other, strict=True)]
    mean = sum(apart) / len(apart)
    if len(apart) < 2:
        return mean, float("nan")
    spread = sum((value - mean) ** 2 for value in apart) / (len(apart) - 1)
    return mean, (spread / len(apart)) ** 0.5


def averaged(means: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a suite's means."""
    rows = []
    for group, mean in means.items():
        score = "" if mean["score"] is None else f"{mean['score']:.2f}"
        missing = f"without {', '.join(mean['missing'])}" if mean["missing"] else ""
        rows.append([group, score, str(mean["of"]), missing])
    columns: list[tuple[str, Any]] = [("mean", "left"), ("score", "right"), ("of", "right"), ("", "left")]
    Screen().table("", columns, rows)
