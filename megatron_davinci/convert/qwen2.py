"""Qwen2 and Qwen2.5: grouped-query attention with biases on queries, keys and values; tied or untied embeddings."""

from __future__ import annotations

from megatron_davinci.convert.decoder import decoder, qkv_bias
from megatron_davinci.convert.family import Family, defaulting

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=decoder(qkv_bias()),
    switches={"qkv_bias": True, "qk_norm": False},
    keys=defaulting(num_key_value_heads=32),
    written={"use_sliding_window": False},
)
