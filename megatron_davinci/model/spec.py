"""The layer: which module stands in each place of a Megatron-Core transformer layer."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_davinci.config.model import ModelConfig
from megatron_davinci.model.attention import SDPAttention
from megatron_davinci.model.heads_norm import AllHeadsRMSNorm
from megatron_davinci.model.norm import ApexRMSNorm, KernelRMSNorm, RMSNorm
from megatron_davinci.model.post_norm import NormalizedRowParallelLinear
from megatron_davinci.model.rotated_attention import RotatedAttention
from megatron_davinci.model.router import Router
from megatron_davinci.model.swiglu_mlp import SwiGLUMLP
from megatron_davinci.platform.backends import Backends


def layer_spec(
    backends: Backends,
    *,
    qk_norm: bool = False,
    experts: int | None = None,
    heads: tuple[int, int] | None = None,
    post_norm: bool = False,
) -> ModuleSpec:
    """The specification of one layer: attention, SwiGLU MLP or experts, and a norm before or behind each.

    All kinds have the same names in a checkpoint, so that one may be loaded into the other.

    Args:
        backends: Whose layers, attention and norms to build.
        qk_norm: Whether queries and keys are normalised, head by head.
        experts: How many there are; None for one MLP.
        heads: Query heads and key heads that one norm each spans; None for no such norm. In our own layers only.
        post_norm: Whether norms stand behind attention and MLP, and none before. In our own layers only.
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
    own_rope, own_swiglu = (choice.name == "davinci" for choice in (backends.rope, backends.swiglu))
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=qk_norm)
    if experts is not None:
        spec.submodules.mlp.submodules.router = Router
        # Transformer Engine fuses this norm into an MLP, but not into experts: there it keeps its own name.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    if own_rope:
        spec.submodules.self_attention.module = RotatedAttention
    if own_swiglu:
        spec.submodules.mlp.module = SwiGLUMLP
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = attention_module(backends)
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if heads is not None:
        attention.q_layernorm, attention.k_layernorm = (
            ModuleSpec(module=AllHeadsRMSNorm, params={"heads": number}) for number in heads
        )
    if post_norm:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
        projection = ModuleSpec(module=NormalizedRowParallelLinear, params={"norm": norm})
        attention.linear_proj = spec.submodules.mlp.submodules.linear_fc2 = projection
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
    return {"apex": ApexRMSNorm, "davinci": KernelRMSNorm}.get(name, RMSNorm)


def block_spec(
    config: Any, backends: Backends, model: ModelConfig, *, chunk: int | None = None
) -> TransformerBlockSubmodules:
    """The specification of a model chunk's layers and of the norm after the last.

    Args:
        config: A Megatron-Core `TransformerConfig`.
        backends: Whose layers, attention and norms to build.
        model: The section `model`.
        chunk: Number of the chunk on this pipeline rank; None where it has one only.
    """
    layer = layer_spec(
        backends,
        qk_norm=config.qk_layernorm,
        experts=config.num_moe_experts,
        heads=(model.num_attention_heads, model.num_query_groups)
        if model.qk_norm and model.qk_norm_scope == "all_heads"
        else None,
        post_norm=model.norm_placement == "post",
    )
    layers = [layer] * get_num_layers_to_build(config, chunk)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_module(backends))
