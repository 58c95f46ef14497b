"""`specialised`: a small domain at a small share from the start, watched for overfitting (SPT, arXiv 2603.16177).

The paper's law splits test loss into training loss and a gap that grows with repetition. The gap is what is watched:
held-out less training loss of the domain, now against where it was smallest. Where training loss by domain is not
recorded, held-out loss that rises above its least says the same, later.
"""

from __future__ import annotations

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.config.mixture import exact_share
from megatron_davinci.train.policies.situation import Situation, Wish

_SMOOTHED = 3  # evaluations: one alone is noise


class SpecialisedPolicy:
    """Holds the domain at its share, and halves what it has when its gap has grown."""

    reads_training_loss = True

    def __init__(self, config: ControllerConfig) -> None:
        settings = config.specialised
        self._domain, self._limit = settings.domain, settings.largest_gap_growth
        self._share = float(exact_share("share", settings.share))

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        mixture = situation.kept()
        growth, what = self._growth(situation)
        pool = situation.pools.get(self._domain, 0)
        epochs = situation.last.unit_tokens.get(self._domain, 0) / pool if pool else 0.0
        seen = f"{epochs:.2f} epochs, {what} grew by {growth:.3f} nats"
        details = {"epochs": epochs, "gap_growth": growth}
        if growth > self._limit:
            share = mixture[self._domain] / 2
            reason = f"{self._domain} overfits ({seen}, more than {self._limit:g}): its share is halved"
        else:
            # Once halved it does not come back: what was repeated too often has not been forgotten.
            present = mixture[self._domain]
            share = self._share if present >= self._share or not self._was_halved(situation) else present
            reason = f"{self._domain} at {share:.4g} from the start ({seen})"
        others = sum(value for unit, value in mixture.items() if unit != self._domain)
        if others <= 0:
            return Wish(mixture, f"{self._domain} is all there is", details)
        scale = (1 - share) / others
        moved = {unit: share if unit == self._domain else value * scale for unit, value in mixture.items()}
        return Wish(moved, reason, details)

    def _values(self, situation: Situation) -> tuple[list[float], str]:
        mine = [e for e in situation.evaluations if self._domain in e.heldout]
        gaps = [
            e.heldout[self._domain] - e.training[self._domain] for e in mine if self._domain in e.training
        ]
        if len(gaps) >= _SMOOTHED:
            return gaps, "held-out less training loss"
        return [e.heldout[self._domain] for e in mine], "held-out loss"

    def _growth(self, situation: Situation) -> tuple[float, str]:
        values, what = self._values(situation)
        return self._above_least(values), what

    def _was_halved(self, situation: Situation) -> bool:
        values, _ = self._values(situation)
        return any(self._above_least(values[:end]) > self._limit for end in range(1, len(values) + 1))

    @staticmethod
    def _above_least(values: list[float]) -> float:
        if len(values) < _SMOOTHED:
            return 0.0
        means = [sum(values[i : i + _SMOOTHED]) / _SMOOTHED for i in range(len(values) - _SMOOTHED + 1)]
        return means[-1] - min(means)
