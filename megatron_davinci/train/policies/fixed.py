"""`fixed`: the mixture stays what the stage says. The control of every comparison."""

from __future__ import annotations

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies.situation import Situation, Wish


class FixedPolicy:
    """Keeps the mixture."""

    reads_training_loss = False

    def __init__(self, config: ControllerConfig) -> None:
        del config

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        return Wish(situation.kept(), "the mixture is fixed")
