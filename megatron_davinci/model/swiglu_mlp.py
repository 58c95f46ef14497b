"""Megatron-Core's MLP with this package's SwiGLU, which leaves nothing but its input to be kept."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_davinci.kernels.swiglu import swiglu_linear


class SwiGLUMLP(MLP):
    """The second linear layer multiplies the product of silu(gate) and up as it computes it.

    Between tensor ranks everything is as Megatron-Core does it: each has its part of the gates, of what they gate and
    of the second layer's columns, and the sum over ranks comes behind. In a checkpoint nothing is different.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_fc2._forward_impl = _multiplied

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the MLP.

        Args:
            hidden_states: [positions on this rank, batch, hidden size].
            args: Unused: Megatron-Core's padding mask is for routers.
            kwargs: The same.

        Returns:
            [positions on this rank, batch, hidden size], and no bias.
        """
        gates, bias = self.linear_fc1(hidden_states)
        assert bias is None, "a bias would be added before the product"
        out: tuple[Tensor, Tensor | None] = self.linear_fc2(gates)
        return out


def _multiplied(input: Tensor, weight: Tensor, **_: Any) -> Tensor:
    """What Megatron-Core's `RowParallelLinear` calls, which knows of no activation."""
    return swiglu_linear(input, weight)
