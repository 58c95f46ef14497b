"""What is read of logits of which tensor ranks have a part of the vocabulary each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Readings:
    """Scores and choices, the same on every rank of a group.

    Args:
        group: Tensor ranks. Logits are [outputs, vocabulary on this rank] each.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def scores(self, targets: Tensor, logits: Tensor, first: int) -> Tensor:
        """[outputs, 2] fp64: the target's log-probability, and 1 where it is the likeliest token."""
        logits, targets = logits.float(), targets[first : first + len(logits)]
        log = self._own_logit(logits, targets) - self._log_z(logits)
        greedy = self.likeliest(logits)[:, 0] == targets
        return torch.stack([log, greedy.double()], 1)

    def moments(self, targets: Tensor, logits: Tensor, first: int) -> Tensor:
        """[outputs, 3] fp64: as `Engine.token_scores` says."""
        logits, targets = logits.float(), targets[first : first + len(logits)]
        log_z = self._log_z(logits)
        logs = logits.double() - log_z[:, None]
        p = logs.exp()
        terms = torch.where(p > 0, logs, 0.0)  # 0 * -inf, where vocabulary padding is masked
        mean = self._over_ranks((p * terms).sum(-1), dist.ReduceOp.SUM)
        apart = self._over_ranks((p * (terms - mean[:, None]).square()).sum(-1), dist.ReduceOp.SUM)
        return torch.stack([self._own_logit(logits, targets) - log_z, mean, apart.sqrt()], 1)

    def likeliest(self, logits: Tensor, first: int = 0) -> Tensor:
        """[outputs, 1] int64: the likeliest token, the first of equals; -1 where a logit is not a number."""
        best, place = logits.max(-1)
        place = place + self._group.rank() * logits.shape[-1]
        if self._group.size() > 1:
            both = torch.stack([best.double(), place.double()], 1)
            parts = [torch.empty_like(both) for _ in range(self._group.size())]
            dist.all_gather(parts, both, group=self._group)
            of_rank = torch.stack(parts)  # [ranks, outputs, 2]
            best, winner = of_rank[:, :, 0].max(0)
            place = of_rank[:, :, 1].gather(0, winner[None])[0].long()
        return torch.where(best.isnan() | best.isinf(), -1, place)[:, None]

    def _over_ranks(self, value: Tensor, how: Any) -> Tensor:
        if self._group.size() > 1:
            dist.all_reduce(value, op=how, group=self._group)
        return value

    def _log_z(self, logits: Tensor) -> Tensor:
        """The logarithm of the sum of the exponentials, over all ranks' parts of the vocabulary: [outputs] fp64."""
        largest = self._over_ranks(logits.amax(-1), dist.ReduceOp.MAX)
        total = (logits - largest[:, None]).exp().sum(-1, dtype=torch.float64)
        return self._over_ranks(total, dist.ReduceOp.SUM).log() + largest

    def _own_logit(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The logit of each target, wherever in the vocabulary it is: [outputs] fp64."""
        here = targets - self._group.rank() * logits.shape[-1]
        ours = (here >= 0) & (here < logits.shape[-1])
        own = logits.gather(1, here.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0].double()
        return self._over_ranks(torch.where(ours, own, 0.0), dist.ReduceOp.SUM)
