"""Mistral: Llama's tensors, and in its first version attention within a window."""

from __future__ import annotations

from megatron_davinci.convert.decoder import decoder
from megatron_davinci.convert.family import Family, defaulting

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    rules=decoder(),
    switches={"qkv_bias": False, "qk_norm": False},
    keys=defaulting(num_key_value_heads=8),
    written={"sliding_window": None},
    windowed=True,
)
