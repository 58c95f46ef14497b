"""`domain_upsampling`: another mixture in the last part of the run (Blakeney et al., 2024, arXiv 2406.03476)."""

from __future__ import annotations

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.config.mixture import exact_share
from megatron_davinci.train.policies.situation import Situation, Wish


class DomainUpsamplingPolicy:
    """Moves to a given mixture from `1 - final_fraction` of the budget on, as fast as bounds allow."""

    reads_training_loss = False

    def __init__(self, config: ControllerConfig) -> None:
        self._fraction = config.domain_upsampling.final_fraction
        self._mixture = {
            unit: float(exact_share(unit, text)) for unit, text in config.domain_upsampling.mixture.items()
        }

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        done = situation.last.tokens / situation.total_tokens
        if done < 1 - self._fraction:
            wait = f"{done:.0%} of the tokens are done; upsampling is for the last {self._fraction:.0%}"
            return Wish(situation.kept(), wait)
        return Wish(self._mixture, f"the last {self._fraction:.0%} of the tokens are for upsampled domains")
