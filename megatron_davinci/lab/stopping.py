"""Stopping runs early, where the design says so: those that diverged, and those that cannot come back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_davinci.files import write_json
from megatron_davinci.lab.arms import Run
from megatron_davinci.lab.design import Metric, Stop
from megatron_davinci.lab.outcomes import STOPPED, Outcome, folder_of, outcome_of

_STEPS = 20
"""Training losses are noisy from step to step; means of so many are compared."""


def diverged(losses: list[float], by: float) -> str:
    """Whether a training loss has left for good, in words; empty where it has not.

    Args:
        losses: By step.
        by: Nats above the lowest mean of 20 steps that the mean of the last 20 may lie.
    """
    if losses and not math.isfinite(losses[-1]):
        return f"diverged: the training loss is {losses[-1]} at step {len(losses):,}"
    if len(losses) < 2 * _STEPS:
        return ""
    means = np.convolve(losses, np.full(_STEPS, 1 / _STEPS), "valid")
    above = float(means[-1] - np.nanmin(means))
    if above <= by:
        return ""
    return (
        f"diverged: at step {len(losses):,} the training loss of {_STEPS} steps is {above:.3f} above its lowest, and "
        f"{by:g} is allowed"
    )


def hopeless(ours: Outcome, control: Outcome, metric: Metric, rule: Stop) -> str:
    """Whether an arm is so far behind the control of its seed that the design gives it up, in words.

    Args:
        ours: The arm's run, at work.
        control: The control's, at work or done.
        metric: That decides.
        rule: The design's.
    """
    if rule.behind is None:
        return ""
    step, step_at = dict(zip(*_by_step(ours, metric.name))), dict(zip(*_by_step(control, metric.name)))
    shared = [one for one in step if one in step_at and one >= rule.after * ours.steps]
    if not shared:
        return ""
    last = max(shared)
    if not math.isfinite(step_at[last]):
        return ""  # the control has diverged, and says nothing of the arm
    behind = step[last] - step_at[last]
    behind = behind if metric.better == "lower" else -behind
    if behind <= rule.behind:
        return ""
    return (
        f"hopeless: at step {last:,} of {ours.steps:,} its {metric.name} is {behind:.3f} behind the control's of the "
        f"same seed, and {rule.behind:g} is allowed from {100 * rule.after:.0f}% on"
    )


def _by_step(one: Outcome, name: str) -> tuple[list[int], list[float]]:
    tokens, values = one.curve(name)
    if name == "train_loss":
        return [], []
    steps = {float(line["consumed_tokens"]): int(line["step"]) for line in one.evaluations}
    return [steps[at] for at in tokens], values


def watcher(
    root: Path, rule: Stop, metric: Metric, control: dict[tuple[str, int], Run]
) -> Callable[[Run], str]:
    """What the runner asks of a run at work, every few seconds: why it should be stopped, or nothing.

    Args:
        root: The lab's folder.
        rule: The design's.
        metric: That decides.
        control: The control's runs by size and seed.
    """

    def why(run: Run) -> str:
        ours = outcome_of(root, run)
        if rule.diverged is not None and (said := diverged(ours.losses, rule.diverged)):
            return said
        theirs = control.get((run.arm.size, run.seed))
        if rule.behind is None or theirs is None or theirs.identity == run.identity:
            return ""
        return hopeless(ours, outcome_of(root, theirs), metric, rule)

    return why


def note(root: Path, run: Run, why: str) -> None:
    """Write down that a run was stopped, and why."""
    write_json(folder_of(root, run) / STOPPED, {"why": why})
