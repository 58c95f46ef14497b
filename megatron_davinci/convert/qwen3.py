"""Qwen3: no biases, and each head's queries and keys normalised before they are rotated."""

from __future__ import annotations

from dataclasses import replace

from megatron_davinci.convert.decoder import HF, MC, decoder, qkv_bias
from megatron_davinci.convert.family import KEYS, Family
from megatron_davinci.convert.llama import OUTPUT_BIAS
from megatron_davinci.convert.rules import Rule

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=decoder(
        qkv_bias(when="qkv_bias"),
        Rule(MC + "self_attention.q_layernorm.weight", (HF + "self_attn.q_norm.weight",), ("dim",)),
        Rule(MC + "self_attention.k_layernorm.weight", (HF + "self_attn.k_norm.weight",), ("dim",)),
    ),
    switches={"qk_norm": True},
    # Where config.json has no head_dim, the class takes 128 and not what divides the hidden size.
    keys=tuple(replace(key, default=128) if key.hf == "head_dim" else key for key in KEYS),
    written={"use_sliding_window": False},
    zeros=(OUTPUT_BIAS,),
)
