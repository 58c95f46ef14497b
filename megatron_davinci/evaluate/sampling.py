"""Tokens drawn from a model instead of the likeliest one; each text by a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a text's tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 for the likeliest token.
        top_p: Only the likeliest tokens that together have so much probability (Holtzman et al., arXiv:1904.09751,
            section 3.1).
        seed: Of the text's generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Draw:
    """Chooses tokens for several texts. What is drawn for one does not depend on the others.

    Args:
        samplings: Of each text.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._samplings = list(samplings)
        self._generators = [np.random.Generator(np.random.Philox(each.seed)) for each in samplings]

    def __call__(self, numbers: Sequence[int], logits: Tensor) -> Tensor:
        """One more token for each of some texts.

        Args:
            numbers: Which texts.
            logits: [texts, vocabulary].

        Returns:
            [texts] int64; -1 where a logit is not a number.
        """
        logits = logits.double()
        best, chosen = logits.max(-1)
        for row, number in enumerate(numbers):
            how = self._samplings[number]
            if how.temperature > 0 and bool(torch.isfinite(best[row])):
                # Below the largest: divided by a temperature of next to nothing, two that are infinite would be none.
                below = (logits[row] - best[row]) / how.temperature
                chosen[row] = self._drawn(below, how.top_p, number)
        return torch.where(torch.isfinite(best), chosen, -1)

    def _drawn(self, logits: Tensor, top_p: float, number: int) -> int:
        shares = logits.softmax(-1)
        if top_p < 1:
            sorted_, order = shares.sort(descending=True, stable=True)
            # The first token counts always; then all before which less than `top_p` has been reached.
            shares[order[sorted_.cumsum(-1) - sorted_ >= top_p]] = 0.0
        # In the vocabulary's order: two tokens that are almost as likely would change places by rounding.
        sums = shares.cumsum(-1)
        place = int(torch.searchsorted(sums, self._generators[number].random() * float(sums[-1]), right=True))
        return min(place, int(shares.nonzero()[-1]))
