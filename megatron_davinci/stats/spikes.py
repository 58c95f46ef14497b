"""Spikes of a loss or a gradient norm: how far a step lies above the steps before it, in robust deviations.

The window's line (level and drift) and its scatter are medians, so what spiked before, and a loss that falls as it
should, move neither much. A gradient norm is taken by its logarithm: it scatters by factors. What counts is only
upwards, and only where it is also large by itself: a run that hardly scatters would spike at every breath.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron_davinci.stats.noise import NORMAL

# A spike is at least this high, whatever the scatter: a part of the loss's level; a factor of the gradient norm.
LEAST_LOSS_RISE = 0.02
LEAST_NORM_FACTOR = 2.0
_RECENT = 0.25  # the part of the window, its end, that says where the level is now


@dataclass(frozen=True)
class Spike:
    """A step that lies too far above those before it.

    Attributes:
        of: `loss` or `grad_norm`.
        value: What the step has.
        expected: What those before it led to expect.
        deviations: How far above, in robust standard deviations of the window.
    """

    of: str
    value: float
    expected: float
    deviations: float

    def __str__(self) -> str:
        name = "loss" if self.of == "loss" else "gradient norm"
        return (
            f"{name} {self.value:.4g}, {self.deviations:.1f} deviations above the {self.expected:.4g} of the steps "
            "before"
        )


class SpikeWindow:
    """The last steps of a run, and whether the next is a spike. A function of those steps alone.

    Args:
        window: How many steps are looked back on.
        least: How many must be known before anything is a spike.
        deviations: How far above them a spike is.
    """

    def __init__(self, window: int, least: int, deviations: float) -> None:
        self._least, self._deviations = least, deviations
        self._loss: deque[float] = deque(maxlen=window)
        self._norm: deque[float] = deque(maxlen=window)
        self._regime: Hashable = None

    def add(self, loss: float, grad_norm: float, regime: Hashable = None) -> None:
        """Take a step that was applied.

        Args:
            loss: Its loss.
            grad_norm: Its gradient's norm, before clipping.
            regime: What changes when steps cannot be compared any more: stage, mixture, batch size.
        """
        self._begin(regime)
        self._loss.append(loss)
        # A norm of 0 has no logarithm; it is no spike either.
        self._norm.append(math.log(max(grad_norm, 1e-30)))

    def judge(self, loss: float, grad_norm: float, regime: Hashable = None) -> Spike | None:
        """Whether a step is a spike. Nothing is kept of it.

        Args:
            loss: Its loss, finite.
            grad_norm: Its gradient's norm, finite.
            regime: As in `add`.
        """
        if regime != self._regime or len(self._loss) < self._least:
            return None
        level, scatter = expected_next(list(self._loss))
        above = loss - level
        if above > self._deviations * scatter and above > LEAST_LOSS_RISE * abs(level):
            return Spike("loss", loss, level, above / max(scatter, 1e-12))
        level, scatter = expected_next(list(self._norm))
        above = math.log(max(grad_norm, 1e-30)) - level
        if above > self._deviations * scatter and above > math.log(LEAST_NORM_FACTOR):
            return Spike("grad_norm", grad_norm, math.exp(level), above / max(scatter, 1e-12))
        return None

    def _begin(self, regime: Hashable) -> None:
        if regime != self._regime:
            self._regime = regime
            self._loss.clear()
            self._norm.clear()


def expected_next(values: Sequence[float]) -> tuple[float, float]:
    """What comes after some values, and how far they scatter around their own line.

    The slope is that between the medians of the two halves; the level is the median of the last quarter's distances
    from the line, which is drawn up to the last value and not beyond: a loss that falls does so ever slower.

    Args:
        values: At least 8.

    Returns:
        The expected value, and the standard deviation of the bulk (1.4826 times the median absolute deviation).
    """
    # Lists and not arrays: of a hundred numbers, `sorted` knows the median before numpy has begun.
    count = len(values)
    half = count // 2
    slope = (_median(values[count - half :]) - _median(values[:half])) / (count - half)
    off = [value - slope * (i - count + 1) for i, value in enumerate(values)]
    level = _median(off[-max(8, int(_RECENT * count)) :])
    middle = _median(off)
    return level, NORMAL * _median([abs(value - middle) for value in off])


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
