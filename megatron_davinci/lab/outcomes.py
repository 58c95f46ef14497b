"""What runs came to: metrics at the end and on the way, their cost, and those that did not come to their end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_davinci.data.journal import Journal
from megatron_davinci.evaluate.answers import digest_of_folder
from megatron_davinci.evaluate.results import read_records
from megatron_davinci.lab.arms import Run
from megatron_davinci.lab.design import Evaluate
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.left import steps_left
from megatron_davinci.train.run_directory import read_lines

FAILED = "failed.json"
STOPPED = "stopped.json"
TASK = "task."


@dataclass(frozen=True)
class Score:
    """What a task came to, by one metric.

    Attributes:
        value: The score.
        items: How many were asked; None where the record does not say.
        shots: Examples before each, likewise.
        asked: A digest of the items, likewise.
    """

    value: float
    items: int | None = None
    shots: int | None = None
    asked: str | None = None

    def unlike(self, other: Score) -> str:
        """What two runs were asked differently, in words; empty where they were asked the same."""
        if None not in (self.items, other.items) and self.items != other.items:
            return f"{self.items} items and {other.items}"
        if None not in (self.shots, other.shots) and self.shots != other.shots:
            return f"{self.shots} examples and {other.shots} before each item"
        if None not in (self.asked, other.asked) and self.asked != other.asked:
            return "items of other texts"
        return ""


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        run: The run.
        state: `done`, `failed`, `stopped` (by the design's rule), `begun` or `to do`.
        step: The last on record.
        steps: Of the whole run; one that is done may have passed over the last of them.
        why: Of a failed one, what it said; of a stopped one, why.
        evaluations: Lines of `evals.jsonl`.
        losses: Training loss by step.
        seconds: That its steps took.
        scores: Of tasks that its last checkpoint was asked as a design asks them, by `NAME.METRIC`.
    """

    run: Run
    state: str
    step: int
    steps: int
    why: str = ""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    scores: dict[str, Score] = field(default_factory=dict)

    def metric(self, name: str) -> float | None:
        """A metric at the end; None where the run is not done or lacks it, or where it is no number."""
        if name.startswith(TASK):
            score = self.score(name)
            return None if score is None else score.value
        return (
            None
            if self.diverged(name) or self.state != "done"
            else next(iter(self.curve(name)[1][-1:]), None)
        )

    def diverged(self, name: str) -> bool:
        """Whether the run is done, and a metric is no number at its end."""
        values = self.curve(name)[1] if self.state == "done" and not name.startswith(TASK) else []
        return bool(values) and not math.isfinite(values[-1])

    def score(self, name: str) -> Score | None:
        """A task's metric with what was asked; None where the run is not done or was not asked it."""
        return self.scores.get(name.removeprefix(TASK)) if self.state == "done" else None

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Tokens and values of a metric at each evaluation; for `train_loss` one value, at the end; of tasks none."""
        kind, _, domain = name.partition(".")
        if kind == "train_loss":
            last = self.losses[-max(1, len(self.losses) // 10) :]
            return ([float(self.step)], [sum(last) / len(last)]) if last else ([], [])
        found: tuple[list[float], list[float]] = ([], [])
        for line in self.evaluations:
            values = line.get(kind, {})
            if domain == "mean" and values:
                value = sum(values.values()) / len(values)
            elif domain in values:
                value = values[domain]
            else:
                continue
            found[0].append(float(line["consumed_tokens"]))
            found[1].append(float(value))
        return found


def folder_of(root: Path, run: Run) -> Path:
    """The run directory of a run: by what it computes, so that designs share what they have in common."""
    return run_folder(root, run.identity)


def run_folder(root: Path, identity: str) -> Path:
    """The run directory of an identity."""
    return root / "runs" / identity


def outcome_of(root: Path, run: Run, evaluate: Evaluate | None = None) -> Outcome:
    """Look at a run's directory.

    Args:
        root: The lab's folder.
        run: The run.
        evaluate: What a design asks, whose scores are wanted; None for no scores.
    """
    folder, config = folder_of(root, run), run.arm.config
    schedule = Schedule(config.curriculum, config.data.sequence_length)
    steps = schedule.total_steps
    metrics, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evals.jsonl")
    step = int(metrics[-1]["step"]) if metrics else 0
    why, stopped = _said(folder / FAILED), _said(folder / STOPPED)
    measured = not config.data.validation or (bool(evaluations) and int(evaluations[-1]["step"]) == step)
    done = (
        measured
        and any((folder / "checkpoints").glob(f"step-{step:08d}"))
        and (step == steps or _nothing_left(folder, schedule, metrics))
    )
    return Outcome(
        run=run,
        state="done"
        if done
        else "failed"
        if why
        else "stopped"
        if stopped
        else "begun"
        if metrics
        else "to do",
        step=step,
        steps=steps,
        why=why or stopped,
        evaluations=evaluations,
        losses=[float(line["loss"]) for line in metrics],
        seconds=sum(float(line["seconds"]) for line in metrics),
        scores=_scores(results_of(folder, step, evaluate)) if done and evaluate is not None else {},
    )


def _nothing_left(folder: Path, schedule: Schedule, metrics: Sequence[dict[str, Any]]) -> bool:
    """Whether the journal passes over all steps behind the last one on record: then that one was the run's last."""
    if not metrics:
        return False
    step, sample = int(metrics[-1]["step"]), int(metrics[-1]["consumed_samples"])
    left = steps_left(schedule, Journal.open(folder / "journal.jsonl"), step, sample, schedule.total_steps)
    return next(left, None) is None


def results_of(folder: Path, step: int, evaluate: Evaluate) -> list[dict[str, Any]]:
    """What `davinci eval` kept of a checkpoint that was asked just as a design asks.

    A run may also have been asked by another design, or by hand: with another limit, other texts or examples, or
    before it was trained anew. Such a score is not this design's.

    Args:
        folder: The run's.
        step: The checkpoint's.
        evaluate: What the design asks.
    """
    given = {} if evaluate.data is None else {"data": str(evaluate.data.resolve())}
    checkpoint = digest_of_folder(folder / "checkpoints" / f"step-{step:08d}")
    return [
        record
        for record in read_records(folder / "evals")
        if record["step"] == step
        and record.get("suite") == evaluate.suite
        and record.get("limit") == evaluate.limit
        and record.get("given", {}) == given
        and (evaluate.suite is not None or record.get("task") in evaluate.names)
        and checkpoint in (None, (record.get("identity") or {}).get("checkpoint", checkpoint))
    ]


def _scores(records: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """By `NAME.METRIC`; of a task that was asked again, the last. Means of a suite are lines without a task."""
    found: dict[str, Score] = {}
    for record in records:
        asked = record.get("items"), record.get("shots"), record.get("asked")
        for name, value in (record.get("metrics") or {}).items():
            found[f"{record.get('task')}.{name}"] = Score(float(value), *asked)
    return found


def _said(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["why"])
    except (OSError, ValueError, KeyError):
        return ""
