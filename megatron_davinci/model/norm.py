"""RMSNorm that knows sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.kernels.rms_norm import plain_backward, plain_forward, rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich, 2019).

    Megatron-Core's own fallback without Apex or Transformer Engine refuses sequence parallelism. This one marks
    its weight `sequence_parallel`, so that Megatron-Core sums the weight's gradient over the tensor group, whose
    ranks each see a part of the sequence.

    Shapes:
        input and output: [..., hidden_size], any floating dtype; computed in fp32 or wider, then rounded once.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        if x.is_cuda or not torch.is_grad_enabled():
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return _RMSNormOnCPU.apply(x, self.weight, self.eps)


class ApexRMSNorm(RMSNorm):
    """The same on NVIDIA apex's fused kernel, with the weight marked as above."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        self._fused = fused_rms_norm_affine

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        normal: Tensor = self._fused(x, self.weight, (x.shape[-1],), self.eps)
        return normal


class KernelRMSNorm(RMSNorm):
    """The same on this package's kernel, which on a CPU is plain torch."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return rms_norm(x, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """What torch composes of five operations on a CPU, as one.

    One operation adds one term to the gradient of its input. Of several, the sum would depend on whether they are
    recomputed, in its last bit. It also keeps one number a token besides its input, and is faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normal, scale = plain_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normal

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return *plain_backward(gradient, None, x, weight, scale), None
