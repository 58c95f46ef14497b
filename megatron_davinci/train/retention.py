"""Which checkpoints of a run stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from megatron_davinci.errors import DavinciError
from megatron_davinci.train import checkpoint_files


@dataclass(frozen=True)
class Retention:
    """What of a run's checkpoints stays.

    Attributes:
        newest: How many of the newest.
        every: Those of steps that this divides, forever; None for none.
        best: How many of those with the lowest held-out loss.
    """

    newest: int
    every: int | None = None
    best: int = 0

    def kept(self, steps: Iterable[int], losses: Mapping[int, float]) -> set[int]:
        """Which of the checkpoints stay.

        Args:
            steps: Of the checkpoints that are there.
            losses: Held-out loss by step, of steps that were evaluated.
        """
        there = sorted(steps, reverse=True)
        kept = set(there[: max(1, self.newest)])
        if self.every is not None:
            kept |= {step for step in there if step % self.every == 0}
        # Of equal ones the newer: it has seen more. One that is no number is not measured, and would spoil the order.
        measured = [step for step in there if isfinite(losses.get(step, inf))]
        measured.sort(key=lambda step: (losses[step], -step))
        return kept | set(measured[: self.best])


def prune(
    checkpoints: Path,
    retention: Retention,
    newest: int,
    losses: Callable[[], Mapping[int, float]] = dict,
) -> list[int]:
    """Remove the checkpoints that do not stay, of steps up to the one that was saved last.

    That one has been read back from the disk when this is called, so that the newest verified one always stays. What
    lies beyond it was passed over when the run was resumed: it takes no place among those that stay, and is left for
    somebody to look at.

    Args:
        checkpoints: The run's folder of checkpoints.
        retention: What stays.
        newest: The step that was saved last.
        losses: Reads held-out loss by step; asked only where that decides something.

    Returns:
        Steps of those that were removed.
    """
    try:
        found = {checkpoint_files.step_of(path): path for path in checkpoint_files.steps(checkpoints)}
        there = {step: path for step, path in found.items() if step <= newest}
        if len(there) <= retention.newest:
            return []
        kept = retention.kept(there, losses() if retention.best else {})
    except (DavinciError, OSError):
        return []  # what is there, or which is best, cannot be read: all of them stay
    return [step for step, path in there.items() if step not in kept and checkpoint_files.remove(path)]


def losses_by_step(evaluations: Iterable[Mapping[str, Any]], by: str) -> dict[int, float]:
    """Held-out loss by step, from the lines of `evals.jsonl`.

    Args:
        evaluations: The lines; of two of one step the later one counts.
        by: A domain, or `mean` for the mean of all domains.
    """
    found: dict[int, float] = {}
    for line in evaluations:
        losses: Mapping[str, float] = line["heldout_loss"]
        if by in losses:
            found[int(line["step"])] = losses[by]
        elif by == "mean" and losses:
            found[int(line["step"])] = sum(losses.values()) / len(losses)
    return found
