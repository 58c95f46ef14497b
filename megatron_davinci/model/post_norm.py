"""A norm behind a block, before what it gives is added to the residual (OLMo 2, arXiv 2501.00656, section 3.2)."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class NormalizedRowParallelLinear(RowParallelLinear):
    """Megatron-Core's projection back to the residual stream, and a norm of what it gives.

    In that place of a layer's specification it is the norm behind attention or behind the MLP: the sum over tensor
    ranks is taken, nothing is added yet. In a checkpoint the norm is `...linear_proj.post_layernorm` and
    `...linear_fc2.post_layernorm`.

    Args:
        norm: The norm's module.
    """

    def __init__(self, input_size: int, output_size: int, *, norm: Any, config: Any, **rest: Any) -> None:
        super().__init__(input_size, output_size, config=config, **rest)
        assert self.bias is None, "a bias would be added behind the norm"
        self.post_layernorm = norm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Project and normalise.

        Args:
            input_: [positions, batch, channels on this rank].

        Returns:
            [positions on this rank, batch, hidden], and no bias.
        """
        output, _ = super().forward(input_)
        return self.post_layernorm(output), None
