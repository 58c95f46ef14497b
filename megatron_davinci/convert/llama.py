"""Llama 2 and 3: no biases; from 3.1 on with RoPE's wavelengths stretched."""

from __future__ import annotations

from megatron_davinci.convert.decoder import HF, decoder, qkv_bias
from megatron_davinci.convert.family import Family
from megatron_davinci.convert.rules import Zeros

# `attention_bias` puts biases on all four projections of Llama's attention, and ours has three.
OUTPUT_BIAS = Zeros(HF + "self_attn.o_proj.bias", ("hidden",), when="qkv_bias")

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rules=decoder(qkv_bias(when="qkv_bias")),
    switches={"qk_norm": False},
    fixed={"mlp_bias": False},
    zeros=(OUTPUT_BIAS,),
)
