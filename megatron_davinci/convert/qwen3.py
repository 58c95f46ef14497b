"""Qwen3: no biases, and each head's queries and keys normalised before they are rotated."""

from __future__ import annotations

from megatron_davinci.convert.decoder import HF, MC, decoder, qkv_bias
from megatron_davinci.convert.family import Family, defaulting
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
    # Not what divides the hidden size.
    keys=defaulting(num_key_value_heads=32, head_dim=128),
    written={"use_sliding_window": False},
    zeros=(OUTPUT_BIAS,),
)
