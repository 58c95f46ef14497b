"""What runs came to: metrics at the end and on the way, their cost, and those that did not come to their end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_davinci.lab.arms import Run
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.run_directory import read_lines

FAILED = "failed.json"
STOPPED = "stopped.json"
TASK = "task."


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        run: The run.
        state: `done`, `failed`, `stopped` (by the design's rule), `begun` or `to do`.
        step: The last on record.
        steps: Of the whole run.
        why: Of a failed one, what it said; of a stopped one, why.
        evaluations: Lines of `evals.jsonl`.
        losses: Training loss by step.
        seconds: That its steps took.
        scores: Of tasks that its last checkpoint was asked, by `NAME.METRIC`.
    """

    run: Run
    state: str
    step: int
    steps: int
    why: str = ""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)

    def metric(self, name: str) -> float | None:
        """A metric at the end; None where the run is not done or lacks it."""
        if name.startswith(TASK):
            return self.scores.get(name.removeprefix(TASK)) if self.state == "done" else None
        return self.curve(name)[1][-1] if self.state == "done" and self.curve(name)[1] else None

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


def outcome_of(root: Path, run: Run) -> Outcome:
    """Look at a run's directory."""
    folder, config = folder_of(root, run), run.arm.config
    steps = Schedule(config.curriculum, config.data.sequence_length).total_steps
    metrics, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evals.jsonl")
    step = int(metrics[-1]["step"]) if metrics else 0
    why, stopped = _said(folder / FAILED), _said(folder / STOPPED)
    measured = not config.data.validation or (bool(evaluations) and int(evaluations[-1]["step"]) == step)
    done = step == steps and measured and any((folder / "checkpoints").glob(f"step-{steps:08d}"))
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
        scores=_scores(folder, steps) if done else {},
    )


def _scores(folder: Path, step: int) -> dict[str, float]:
    """What `davinci eval` kept of a checkpoint; of a task that was asked again, the last."""
    found: dict[str, float] = {}
    for line in read_lines(folder / "evals" / "results.jsonl"):
        if int(line["step"]) == step:
            found |= {f"{line['task']}.{name}": float(value) for name, value in line["metrics"].items()}
    return found


def _said(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["why"])
    except (OSError, ValueError, KeyError):
        return ""
