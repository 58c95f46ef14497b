"""How sharp the loss is in the last token's logits: what rises before a run of too few bits diverges.

Lee et al., 2024, To FP8 and Back Again, arXiv 2405.18710, section 4: the sharpness of Keskar et al. (2017, arXiv
1609.04836, metric 2.1) of the logits y in place of the weights, so that it costs no pass of the model:

    100 (max L(y + d) - L(y)) / (1 + L(y))   over |d_i| <= epsilon (|y_i| + 1).

The cross entropy rises with every logit but the label's, and falls with that one, wherever in the box one stands. So
its largest value is at one corner, which is written down here; where the paper searches, there is nothing to search.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def logit_sharpness(
    logits: Tensor, labels: Tensor, *, epsilon: float, tokens: int, first: int = 0, group: Any = None
) -> Tensor:
    """The sharpness of each label's cross entropy.

    Args:
        logits: [n, vocabulary on this rank].
        labels: [n] int64.
        epsilon: Half the width of the box, relative.
        tokens: Logits from this one on are padding.
        first: Number of this rank's first logit.
        group: The ranks that the vocabulary is split over; None for one.

    Returns:
        [n] fp32, the same on every rank.
    """
    y = logits.double()  # what is looked for is a small difference of two large numbers
    ids = torch.arange(first, first + y.shape[-1], device=y.device)
    hit = ids == labels.unsqueeze(-1)
    away = epsilon * (y.abs() + 1)
    worst = torch.where(hit, y - away, y + away)
    plain, moved = (_cross_entropy(one, hit, ids < tokens, group) for one in (y, worst))
    return (100 * (moved - plain) / (1 + plain)).float()


def _cross_entropy(y: Tensor, hit: Tensor, real: Tensor, group: Any) -> Tensor:
    y = y.masked_fill(~real, -torch.inf)
    largest = _over(group, y.amax(-1), dist.ReduceOp.MAX)
    total = _over(group, (y - largest.unsqueeze(-1)).exp().sum(-1), dist.ReduceOp.SUM)
    label = _over(group, y.masked_fill(~hit, 0.0).sum(-1), dist.ReduceOp.SUM)
    return largest + total.log() - label


def _over(group: Any, mine: Tensor, how: Any) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(mine, op=how, group=group)
    return mine


class SharpnessMonitor:
    """Adds up the sharpness at the last token of each sequence of a step, where it is asked for.

    Args:
        epsilon: Half the width of the box, relative.
        last: Whether this rank has the last token of its sequences: with context parallelism one rank does.
        device: What the model computes on.

    Attributes:
        on: Whether it is asked for at present.
        total: [2] fp64: the sum over sequences, and their number.
    """

    def __init__(self, epsilon: float, *, last: bool, device: torch.device) -> None:
        self.epsilon, self.last, self.on = epsilon, last, False
        self.total = torch.zeros(2, dtype=torch.float64, device=device)

    def begin(self, on: bool) -> None:
        """Say that a step begins, and whether it is asked for in it."""
        self.on = on
        self.total.zero_()

    def add(self, logits: Tensor, labels: Tensor, *, tokens: int, first: int, group: Any) -> None:
        """Add the last tokens of a micro-batch.

        Args:
            logits: [batch, vocabulary on this rank].
            labels: [batch] int64.
            tokens: Logits from this one on are padding.
            first: Number of this rank's first logit.
            group: The ranks that the vocabulary is split over.
        """
        found = logit_sharpness(logits, labels, epsilon=self.epsilon, tokens=tokens, first=first, group=group)
        if self.last:
            self.total += torch.stack([found.double().sum(), self.total.new_tensor(float(len(found)))])
