"""What early checkpoints say of late ones, and how few items would say as much, from what was kept of every item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.data.knowledge.facts import KINDS
from megatron_davinci.evaluate.item_scores import ItemScores
from megatron_davinci.evaluate.naming import GENERATION, LIKELIHOOD, format_of
from megatron_davinci.stats.memory import Memory, memory
from megatron_davinci.stats.prediction import (
    Decision,
    EarlyForecast,
    agreement_with_last,
    decision,
    early_forecast,
    leaves_chance,
)
from megatron_davinci.stats.subsets import DiscriminativeSubset, discriminative_subset

LEAST_RUNS = 4  # six pairs


@dataclass(frozen=True)
class Course:
    """A task over the checkpoints of one run.

    Attributes:
        task: Its name.
        protocol: How it was asked.
        run: Which.
        checkpoints: How many.
        chance: Of guessing; None for a task without options.
        above_chance: Tokens from which on it is above chance; None for not at all.
        half: Tokens of the last checkpoint in the first half of the tokens; None for none.
        settled: Kendall's tau of items' scores there with those at the last checkpoint: of the right option's share
            of the probability where items have options, of the score elsewhere.
        forecast: The last value from the first half, of texts in bits per byte; None for too few checkpoints.
    """

    task: str
    protocol: str
    run: str
    checkpoints: int
    chance: float | None
    above_chance: float | None
    half: float | None
    settled: float
    forecast: EarlyForecast | None


@dataclass(frozen=True)
class Foretold:
    """How an early measurement orders runs, against a task's score at the end.

    Attributes:
        target: The task.
        step: Of the early checkpoints.
        by: What was measured there.
        decision: How well.
    """

    target: str
    step: int
    by: str
    decision: Decision


def courses(tasks: Sequence[ItemScores]) -> list[Course]:
    """Every task of every run that has two checkpoints with known tokens."""
    found = []
    for task in _plain(tasks):
        for run in dict.fromkeys(task.runs):
            rows = [
                row
                for row in range(len(task.models))
                if task.runs[row] == run and np.isfinite(task.tokens[row]) and task.tokens[row] > 0
            ]
            if len(rows) > 1 and task.items:
                found.append(_course(task, run, sorted(rows, key=lambda row: task.tokens[row])))
    return found


def _course(task: ItemScores, run: str, rows: list[int]) -> Course:
    tokens, scores = np.array([task.tokens[row] for row in rows]), task.scores[rows]
    means = scores.mean(1)
    finest = task.chosen[rows] if np.isfinite(task.chosen[rows]).all() else scores
    early = np.flatnonzero(tokens <= tokens[-1] / 2)
    chance = task.chance or None
    above = leaves_chance(scores, chance) if chance is not None else None
    return Course(
        task=task.task,
        protocol=task.protocol,
        run=run,
        checkpoints=len(rows),
        chance=chance,
        above_chance=float(tokens[above]) if above is not None else None,
        half=float(tokens[early[-1]]) if len(early) else None,
        settled=float(agreement_with_last(finest[[early[-1], -1]])[0]) if len(early) else float("nan"),
        forecast=early_forecast(tokens, -means if task.protocol == "text" else means),
    )


def memories(tasks: Sequence[ItemScores]) -> list[tuple[ItemScores, str, Memory]]:
    """What became of made-up facts: (probes, run, memory) of each run with three checkpoints."""
    found = []
    for task in tasks:
        for run in dict.fromkeys(task.runs) if task.protocol in KINDS else ():
            rows = [row for row in range(len(task.models)) if task.runs[row] == run]
            rows = sorted(
                (row for row in rows if np.isfinite(task.tokens[row])), key=lambda row: task.tokens[row]
            )
            if len(rows) > 2:
                found.append((task, run, memory([task.tokens[row] for row in rows], task.scores[rows])))
    return found


def subsets(tasks: Sequence[ItemScores], seed: int = 0) -> list[tuple[ItemScores, DiscriminativeSubset]]:
    """The fewest items of each task that rank all models alike, where there are enough models to say."""
    found = []
    for task in _plain(tasks):
        if len(task.items) > 2 and (subset := discriminative_subset(task.scores, seed=seed)) is not None:
            found.append((task, subset))
    return found


def foretold(tasks: Sequence[ItemScores]) -> list[Foretold]:
    """How early measurements of several runs have the runs' order at the end, for each task and shared checkpoint.

    A task is foretold by its own score, by the share of probability that the right options have, and by the best of
    all others, which is the luckiest too: how many it was taken from is in its name.
    """
    measured = {name: values for task in _plain(tasks) for name, values in _measurements(task)}
    found = []
    for task in _plain(tasks):
        score, share = _names_of(task)
        runs = list(dict.fromkeys(task.runs))
        known = [measured[name] for name in measured if {*runs} <= {run for run, _ in measured[name]}]
        steps = sorted(
            set.intersection(
                *({step for run, step in values if run == one} for values in known for one in runs)
            )
        )
        if len(runs) < LEAST_RUNS or len(steps) < 2:
            continue
        final = [measured[score][run, steps[-1]] for run in runs]
        for step in steps[:-1]:
            by = {
                name: decision([values[run, step] for run in runs], final)
                for name, values in measured.items()
                if all((run, step) in values for run in runs)
            }
            found += [Foretold(score, step, name, by[name]) for name in (score, share) if name in by]
            others = {name: one for name, one in by.items() if name not in (score, share)}
            others = {name: one for name, one in others.items() if np.isfinite(one.tau)}
            if others:
                best = max(others, key=lambda name: others[name].tau)
                found.append(Foretold(score, step, f"{best} (best of {len(others)})", others[best]))
    return found


def _plain(tasks: Sequence[ItemScores]) -> Iterator[ItemScores]:
    return (task for task in tasks if task.protocol not in KINDS and format_of(task.task) is None)


def _names_of(task: ItemScores) -> tuple[str, str]:
    known = task.task.endswith((f"_{LIKELIHOOD}", f"_{GENERATION}")) or task.protocol == "text"
    name = task.task if known else f"{task.task}, {task.protocol}"
    return name, f"{name}: share of the right option"


def _measurements(task: ItemScores) -> Iterator[tuple[str, dict[tuple[str, int], float]]]:
    score, share = _names_of(task)
    yield score, _by_checkpoint(task, task.scores)
    if np.isfinite(task.chosen).all():
        yield share, _by_checkpoint(task, task.chosen)


def _by_checkpoint(task: ItemScores, values: NDArray[np.float64]) -> dict[tuple[str, int], float]:
    means = values.mean(1).tolist()
    return dict(zip(zip(task.runs, task.steps, strict=True), means, strict=True))
