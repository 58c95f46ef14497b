"""Whose implementation runs, where there are several of the same mathematics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class BackendsConfig(Section):
    """`auto` takes what is there, and one line of the log says what and why. A name that cannot run is an error."""

    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto", description="auto: Transformer Engine's on GPUs where it is installed, else ours"
    )
    attention: Literal["auto", "sdpa", "flash_attn", "transformer_engine"] = Field(
        default="auto",
        description="sdpa: torch's kernels; flash_attn: the package flash-attn, in bf16; auto: Transformer Engine's "
        "in its layers unless documents confine it, else torch's",
    )
    norm: Literal["auto", "local", "transformer_engine", "apex", "davinci"] = Field(
        default="auto",
        description="local: torch's RMSNorm; apex: NVIDIA's; davinci: this package's kernel; auto: Transformer "
        "Engine's in its layers, else local",
    )
    rope: Literal["auto", "megatron", "davinci"] = Field(
        default="auto",
        description="megatron: Megatron-Core's rotary positions; davinci: this package's, in place with fp32 cosines "
        "and sines, and with the bias of queries, keys and values; auto: Megatron-Core's",
    )
    swiglu: Literal["auto", "megatron", "davinci"] = Field(
        default="auto",
        description="megatron: SwiGLU as Megatron-Core composes it; davinci: this package's, which keeps no product "
        "for the layer behind it and computes it again in the backward pass; auto: Megatron-Core's",
    )
    optimizer: Literal["auto", "torch", "transformer_engine", "apex", "davinci"] = Field(
        default="auto",
        description="Whose fused AdamW; davinci: this package's, with clipping in the same pass; auto: on GPUs "
        "Transformer Engine's, else apex's, else torch's; with optimizer.moments: fp8 davinci",
    )
    loss: Literal["auto", "megatron", "davinci"] = Field(
        default="auto",
        description="megatron: Megatron-Core's cross entropy; davinci: this package's, which overwrites the logits "
        "and keeps nothing of their size; auto: Megatron-Core's",
    )
    loss_chunk_tokens: int | None = Field(
        default=None,
        gt=0,
        description="With loss: davinci: logits of so many tokens at a time, computed again in the backward pass; "
        "null: of all at once, kept",
    )

    weight_gradient: Literal["auto", "megatron", "davinci"] = Field(
        default="auto",
        description="megatron: made, and then added to the fp32 sum; davinci: added by the product that makes it, by "
        "apex's extension where it is installed and torch's product elsewhere; auto: Megatron-Core's way",
    )

    @model_validator(mode="after")
    def _only_what_acts(self) -> BackendsConfig:
        if self.loss_chunk_tokens is not None and self.loss != "davinci":
            raise ValueError(f"loss_chunk_tokens acts with loss: davinci; found loss: {self.loss}")
        return self
