"""`loss_weighted`: more of what lies further above a reference model, online (DoReMi, Xie et al., 2023, arXiv
2305.10429).

DoReMi trains a proxy model with `w <- w * exp(step * excess)`, smoothed towards even shares, and uses the mean
weights afterwards. Here the same update moves the run's own mixture, from held-out in place of training loss.
"""

from __future__ import annotations

from math import exp

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies.situation import Situation, Wish


class LossWeightedPolicy:
    """Exponentiated gradient on excess loss, clipped at 0 as in DoReMi."""

    reads_training_loss = False

    def __init__(self, config: ControllerConfig) -> None:
        self._settings = config.loss_weighted

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        losses = situation.last.heldout
        excess = {
            unit: max(losses[unit] - reference, 0.0)
            for unit, reference in self._settings.reference.items()
            if unit in losses
        }
        kept = situation.kept()
        most = max(excess.values(), default=0.0)
        raised = {
            unit: share * exp(self._settings.step_size * (excess.get(unit, 0.0) - most))
            for unit, share in kept.items()
        }
        total = sum(raised.values())
        even = self._settings.smoothing / len(kept)
        mixture = {
            unit: (1 - self._settings.smoothing) * share / total + even for unit, share in raised.items()
        }
        words = ", ".join(f"{unit} {value:.3f}" for unit, value in sorted(excess.items()))
        return Wish(mixture, f"loss above the reference: {words} nats", {"excess": excess})
