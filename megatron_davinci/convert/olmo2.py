"""OLMo 2: norms behind attention and MLP, none before; queries and keys normalised over all heads together."""

from __future__ import annotations

from megatron_davinci.convert.decoder import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE_UP,
    HF,
    MC,
    OUTPUT,
    PROJECTION,
    QKV,
    qkv_bias,
)
from megatron_davinci.convert.family import Family, defaulting
from megatron_davinci.convert.llama import OUTPUT_BIAS
from megatron_davinci.convert.rules import Rule

OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    rules=(
        EMBEDDING,
        QKV,
        qkv_bias(when="qkv_bias"),
        Rule(MC + "self_attention.q_layernorm.weight", (HF + "self_attn.q_norm.weight",), ("q",)),
        Rule(MC + "self_attention.k_layernorm.weight", (HF + "self_attn.k_norm.weight",), ("kv",)),
        PROJECTION,
        Rule(
            MC + "self_attention.linear_proj.post_layernorm.weight",
            (HF + "post_attention_layernorm.weight",),
            ("hidden",),
        ),
        GATE_UP,
        DOWN,
        Rule(
            MC + "mlp.linear_fc2.post_layernorm.weight",
            (HF + "post_feedforward_layernorm.weight",),
            ("hidden",),
        ),
        FINAL_NORM,
        OUTPUT,
    ),
    switches={"qk_norm": True, "qk_norm_scope": "all_heads", "norm_placement": "post"},
    keys=defaulting(rms_norm_eps=1e-5),
    zeros=(OUTPUT_BIAS,),
)
