"""Mixture-of-experts layers: how many experts, how tokens are routed, and what keeps experts equally busy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class ExpertsConfig(Section):
    """Every layer's MLP becomes `number` of them, of `model.ffn_hidden_size` channels; a token goes through `top_k`.

    A router scores the experts with one matrix. The best `top_k` scores, through a softmax, weigh the outputs; with
    one expert a token, its share of the softmax over all scores does (Switch Transformer, arXiv:2101.03961, eq. 2).
    No token is dropped, whatever the load.
    """

    number: int = Field(gt=1, description="Experts in each layer")
    top_k: int = Field(default=2, gt=0, description="Experts that a token goes through")
    shared_ffn_hidden_size: int | None = Field(
        default=None,
        gt=0,
        description="Channels of an MLP beside the experts that all tokens go through; null for none",
    )
    balance: Literal["sequence", "micro_batch", "none"] = Field(
        default="sequence",
        description="What the load-balancing loss evens out (Switch Transformer): the load of each sequence, or of "
        "each micro-batch, with which it depends on train.micro_batch_size",
    )
    balance_coefficient: float = Field(default=0.01, ge=0, description="Weight of the load-balancing loss")
    router_z_loss: float = Field(
        default=0.0, ge=0, description="Weight of the router's z-loss (ST-MoE), which keeps its logits small"
    )

    @model_validator(mode="after")
    def _enough_experts(self) -> ExpertsConfig:
        if self.top_k > self.number:
            raise ValueError(f"top_k ({self.top_k}) is more than there are experts ({self.number})")
        return self
