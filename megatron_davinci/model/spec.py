"""The layer: which module stands in each place of a Megatron-Core transformer layer."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.model.attention import SDPAttention
from megatron_davinci.model.norm import RMSNorm
from megatron_davinci.model.router import Router
from megatron_davinci.platform.device import Platform


def use_transformer_engine(layers: str, platform: Platform) -> bool:
    """Decide whose layers are built.

    Args:
        layers: `model.layers` of the configuration: `auto`, `local` or `transformer_engine`.
        platform: What the run computes on.

    Raises:
        EnvironmentProblem: Transformer Engine was asked for by name and is not usable here.
    """
    if layers == "transformer_engine" and not platform.transformer_engine:
        raise EnvironmentProblem(
            "Transformer Engine was asked for by name and cannot be used here.",
            where="model.layers",
            found=f"platform {platform.name}"
            + ("" if platform.name == "cpu" else ", the package does not import"),
            do="install it on a CUDA machine (pip install 'megatron-davinci[gpu]'), or set model.layers=auto",
        )
    return layers != "local" and platform.transformer_engine


def layer_spec(
    transformer_engine: bool, *, documents: bool = False, qk_norm: bool = False, experts: int | None = None
) -> ModuleSpec:
    """The specification of one layer: attention, SwiGLU MLP or experts, and a norm before each.

    Both kinds have the same names in a checkpoint, so that one may be loaded into the other.

    Args:
        transformer_engine: Whose layers to build.
        documents: Whether attention will be confined to documents. Transformer Engine's would need tokens packed in
            another way, and document lengths that divide; so ours stands in its layers too.
        qk_norm: Whether queries and keys are normalised, head by head.
        experts: How many there are; None for one MLP.
    """
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=qk_norm
        )
        if documents:
            spec.submodules.self_attention.submodules.core_attention = SDPAttention
        if experts is not None:
            spec.submodules.mlp.submodules.router = Router
        return spec
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=qk_norm)
    if experts is not None:
        spec.submodules.mlp.submodules.router = Router
        # Transformer Engine fuses this norm into an MLP, but not into experts: there it keeps its own name.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def block_spec(
    config: Any, transformer_engine: bool, *, documents: bool = False, chunk: int | None = None
) -> TransformerBlockSubmodules:
    """The specification of a model chunk's layers and of the norm after the last.

    Args:
        config: A Megatron-Core `TransformerConfig`.
        transformer_engine: Whose layers to build.
        documents: Whether attention will be confined to documents.
        chunk: Number of the chunk on this pipeline rank; None where it has one only.
    """
    final_norm: Any = RMSNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        final_norm = TENorm
    layer = layer_spec(
        transformer_engine,
        documents=documents,
        qk_norm=config.qk_layernorm,
        experts=config.num_moe_experts,
    )
    layers = [layer] * get_num_layers_to_build(config, chunk)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)
