"""The router of a layer of experts, with auxiliary losses that do not depend on the layout."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Megatron-Core's router, whose auxiliary losses are means over the tokens of the global batch.

    The gradient is summed over all ranks and divided once, by what the labels weigh. So an auxiliary loss, which is a
    mean over tokens, has to be multiplied by the number of the tokens that it is a mean of. Megatron-Core 0.16
    (`router.py`, `attach_and_log_load_balancing_loss` and `apply_z_loss`) multiplies by the tokens of this rank
    alone, though the mean is over its tensor- and context-parallel group: the gradient is too small by the size of
    the group. And for the loss of sequences it multiplies by the length of one, though there are `micro_batch_size`
    of them.

    Attributes:
        label_weight: What the labels of the global batch weigh, a token; set before each step. Where labels are
            masked, or weigh more than 1, the division above is by another number than that of the tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_weight = 1.0

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        reduce_group_has_dp: bool = False,
        valid_token_count: Any = None,
    ) -> Tensor:
        """Have the backward pass add this rank's part of the load-balancing loss. `activation` goes on as it is.

        The rest is as Megatron-Core calls it; its log, which nothing reads, is not kept.
        """
        tokens = activation.shape[0] * reduce_group.size() * self.label_weight
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Have the backward pass add this rank's part of the z-loss (Zoph et al., 2022, arXiv 2202.08906, eq. 5).

        Args:
            logits: [tokens on this rank, experts].
            padding_mask: Must be None.
        """
        if not self.config.moe_z_loss_coeff or not self.training or not logits.requires_grad:
            return logits
        tokens = logits.shape[0] * self.label_weight
        return MoEAuxLossAutoScaler.apply(logits, z_loss_func(logits, self.config.moe_z_loss_coeff) * tokens)


def routers(chunks: Any) -> list[Router]:
    """The routers of a rank's model chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
