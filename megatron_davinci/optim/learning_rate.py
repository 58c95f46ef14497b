"""The learning rate inside a stage: a warm-up, then a shape, over what the stage has consumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_davinci.config.curriculum import LearningRate


@dataclass(frozen=True)
class RateSpan:
    """A stage's learning rate, with where in the run its parts lie.

    Attributes:
        rate: Warm-up and shape.
        sequence_length: Tokens a sample.
        first: Samples consumed before the stage.
        warm: Samples consumed when the warm-up is over.
        decay: Samples consumed where the shape begins to fall: `warm`, or later for `wsd`.
        last: Samples consumed before the stage's last step, where every shape but constant arrives at its end.
    """

    rate: LearningRate
    sequence_length: int
    first: int
    warm: int
    decay: int
    last: int

    def at(self, *, step: int, sample: int, batch: int) -> float:
        """The learning rate of a step.

        Args:
            step: Steps of the stage before it.
            sample: Samples of the run before it.
            batch: Its samples.
        """
        rate = self.rate
        if sample < self.warm:
            # The step that ends the warm-up has the peak.
            if rate.warmup_tokens is None:
                done = (step + 1) / rate.warmup_steps
            else:
                done = (sample + batch - self.first) * self.sequence_length / rate.warmup_tokens
            if done >= 1.0:
                return rate.peak
            return rate.warmup_from + (rate.peak - rate.warmup_from) * done
        if rate.shape == "constant" or rate.end is None or sample <= self.decay:
            return rate.peak
        if sample >= self.last:
            return rate.end
        shape = rate.shape if rate.shape != "wsd" else rate.decay or "1-sqrt"
        return fallen(shape, rate.peak, rate.end, (sample - self.decay) / (self.last - self.decay))


def fallen(shape: str, peak: float, end: float, progress: float) -> float:
    """Between peak and end.

    Args:
        shape: `linear`, `cosine`, `1-sqrt` (Hägele et al. 2024, arXiv 2405.18392) or `exponential`, whose logarithm
            is linear (MiniCPM's decay, Hu et al. 2024, arXiv 2404.06395, which halves in equal stretches).
        peak: At progress 0.
        end: At progress 1.
        progress: From 0 to 1.
    """
    if shape == "exponential":
        return peak * (end / peak) ** progress
    if shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - (math.sqrt(progress) if shape == "1-sqrt" else progress)
    return end + (peak - end) * left
