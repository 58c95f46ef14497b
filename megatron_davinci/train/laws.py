"""Published laws that a plan is held against. They are priors from other models and data, not promises."""

from __future__ import annotations

import math

REPETITION_DECAY = 15.387756
"""R*_D of the data-constrained law: how many passes it takes for repeated tokens to lose 1 - 1/e of their worth."""


def step_law(parameters: int, tokens: int) -> tuple[float, float]:
    """The Step Law's best peak learning rate and batch size (Li et al. 2025, arXiv 2503.04715).

    `1.79 N^-0.713 D^0.307` and `0.58 D^0.571`, fitted on models of 0.2B to 1.1B parameters and 4B to 100B tokens,
    with AdamW, sequences of 2,048 and a final learning rate of 1e-5 for all.

    Args:
        parameters: N, without embeddings.
        tokens: D.

    Returns:
        Peak learning rate, and tokens in a global batch.
    """
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def fresh_equivalent(epochs: float) -> float:
    """How many passes through new text a number of passes through the same text are worth.

    The data-constrained law (Muennighoff et al. 2023, arXiv 2305.16264, section 3.1):
    `1 + R*_D (1 - exp(-(epochs - 1) / R*_D))`, and `epochs` itself below one pass.
    """
    if epochs <= 1:
        return epochs
    return 1 + REPETITION_DECAY * (1 - math.exp(-(epochs - 1) / REPETITION_DECAY))


def last_pass_worth(epochs: float) -> float:
    """What a token of the last pass adds, against a new one: the derivative of `fresh_equivalent`."""
    return 1.0 if epochs <= 1 else math.exp(-(epochs - 1) / REPETITION_DECAY)
