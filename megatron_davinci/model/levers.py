"""The levers of the configuration in the words of Megatron-Core's `TransformerConfig`."""

from __future__ import annotations

from typing import Any

from megatron_davinci.config import RunConfig


def lever_settings(config: RunConfig) -> dict[str, Any]:
    """What the levers set in a `TransformerConfig`."""
    settings: dict[str, Any] = {
        # Of a norm over all heads a tensor rank has its own weights, whose gradients are not to be summed over ranks.
        "qk_layernorm": config.model.qk_norm and config.model.qk_norm_scope == "head",
        "deterministic_mode": config.train.deterministic,
        "tp_comm_overlap": config.parallel.overlap_tensor,
        **recompute_settings(config),
        **fp8_settings(config),
    }
    if config.train.cuda_graphs:
        # An empty scope is the whole layer.
        settings |= {"cuda_graph_impl": "local", "cuda_graph_scope": []}
    return settings


def recompute_settings(config: RunConfig) -> dict[str, Any]:
    """Activation recomputation (Korthikanti et al., 2022, arXiv 2205.05198)."""
    recompute = config.train.recompute
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.layers,
    }


def fp8_settings(config: RunConfig) -> dict[str, Any]:
    """FP8 products. Gradients have more range and less precision (E5M2) where a scale serves a whole tensor."""
    fp8 = config.train.fp8
    if fp8.recipe == "none":
        return {}
    return {
        "fp8": "hybrid" if fp8.recipe in ("delayed", "current") else "e4m3",
        "fp8_recipe": fp8.megatron_recipe,
        "fp8_param": fp8.parameters,
    }


def start_tensor_overlap(config: RunConfig) -> None:
    """Give Transformer Engine the buffers through which tensor ranks send activations while products go on.

    After the process groups are up, on every rank.
    """
    from transformer_engine.pytorch.module import base

    tokens = config.data.sequence_length * config.train.micro_batch_size // config.parallel.context
    half = config.train.fp8.recipe == "none"
    if hasattr(base, "UserBufferQuantizationMode"):  # from 2.7 on
        modes = base.UserBufferQuantizationMode
        quantization: dict[str, Any] = {"quantization_modes": [modes.NONE if half else modes.FP8]}
    else:
        quantization = {"use_fp8": not half}
    base.initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=config.parallel.tensor,
        bootstrap_backend="nccl",
        **quantization,
    )
