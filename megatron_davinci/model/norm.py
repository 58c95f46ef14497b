"""RMSNorm that knows sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich, 2019).

    Megatron-Core's own fallback without Apex or Transformer Engine refuses sequence parallelism. This one marks
    its weight `sequence_parallel`, so that Megatron-Core sums the weight's gradient over the tensor group, whose
    ranks each see a part of the sequence.

    Shapes:
        input and output: [..., hidden_size], any floating dtype; the mean square is taken by torch's own kernel.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
