"""One RMSNorm over all heads of the queries, or of the keys, that tensor ranks share among them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_davinci.kernels.rms_norm import widened


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the channels of all heads together, with a weight for each (OLMo 2, arXiv 2501.00656).

    A tensor rank has the weights of its own heads; the mean square is taken over those of all ranks, forward and
    backward by one sum of a number a token.

    Args:
        config: A Megatron-Core `TransformerConfig`.
        hidden_size: Channels of a head.
        eps: Added to the mean square.
        heads: Heads on all tensor ranks; their number is a multiple of the ranks'.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, *, heads: int, **_: Any) -> None:
        super().__init__()
        self.eps, self.channels = eps, heads * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        ranks = self.group.size()
        if heads % ranks:
            raise ValueError(f"{heads} heads are not a multiple of {ranks} tensor ranks")
        self.weight = torch.nn.Parameter(torch.ones(self.channels // ranks, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=ranks > 1, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: [positions, batch, heads on this rank, channels of a head], any floating dtype; computed in fp32 or
                wider, then rounded once.
        """
        group = self.group if self.group.size() > 1 else None
        normal: Tensor = _AllHeads.apply(x, self.weight, self.eps, self.channels, group)
        return normal

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron-Core asks for it: the weight is cut along its axis."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return sharded


class _AllHeads(torch.autograd.Function):
    """As one operation, as `model.norm` says why."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, channels: int, group: Any) -> Tensor:
        wide = widened(x).flatten(-2)
        squares = wide.square().sum(-1, keepdim=True)
        if group is not None:
            dist.all_reduce(squares, group=group)
        scale = torch.rsqrt(squares / channels + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.channels, ctx.group = channels, group
        return (wide * scale * weight).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normal, above = widened(x).flatten(-2) * scale, widened(gradient).flatten(-2)
        for_weight = (above * normal).flatten(0, -2).sum(0)
        above = above * weight
        # Every rank's outputs depend on the mean square, and with it on this rank's inputs.
        along = (above * normal).sum(-1, keepdim=True)
        if ctx.group is not None:
            dist.all_reduce(along, group=ctx.group)
        for_x = (above - normal * (along / ctx.channels)) * scale
        return for_x.to(x.dtype).view(x.shape), for_weight.to(weight.dtype), None, None, None
