"""The layer: which module stands in each place of a Megatron-Core transformer layer."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_davinci.model.attention import SDPAttention
from megatron_davinci.model.norm import ApexRMSNorm, RMSNorm
from megatron_davinci.model.router import Router
from megatron_davinci.platform.backends import Backends


def layer_spec(backends: Backends, *, qk_norm: bool = False, experts: int | None = None) -> ModuleSpec:
    """The specification of one layer: attention, SwiGLU MLP or experts, and a norm before each.

    All kinds have the same names in a checkpoint, so that one may be loaded into the other.

    Args:
        backends: Whose layers, attention and norms to build.
        qk_norm: Whether queries and keys are normalised, head by head.
        experts: How many there are; None for one MLP.
    """
    if backends.layers.name == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=qk_norm
        )
        if backends.attention.name != "transformer_engine":
            spec.submodules.self_attention.submodules.core_attention = attention_module(backends)
        if experts is not None:
            spec.submodules.mlp.submodules.router = Router
        return spec
    norm = norm_module(backends)
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=qk_norm)
    if experts is not None:
        spec.submodules.mlp.submodules.router = Router
        # Transformer Engine fuses this norm into an MLP, but not into experts: there it keeps its own name.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = attention_module(backends)
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return spec


def attention_module(backends: Backends) -> Any:
    """The module between queries, keys, values and the output projection."""
    name = backends.attention.name
    if name == "flash_attn":
        from megatron_davinci.model.flash_attention import FlashAttention

        return FlashAttention
    if name == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return SDPAttention


def norm_module(backends: Backends) -> Any:
    """The module that normalises."""
    name = backends.norm.name
    if name == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return ApexRMSNorm if name == "apex" else RMSNorm


def block_spec(config: Any, backends: Backends, *, chunk: int | None = None) -> TransformerBlockSubmodules:
    """The specification of a model chunk's layers and of the norm after the last.

    Args:
        config: A Megatron-Core `TransformerConfig`.
        backends: Whose layers, attention and norms to build.
        chunk: Number of the chunk on this pipeline rank; None where it has one only.
    """
    layer = layer_spec(backends, qk_norm=config.qk_layernorm, experts=config.num_moe_experts)
    layers = [layer] * get_num_layers_to_build(config, chunk)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_module(backends))
