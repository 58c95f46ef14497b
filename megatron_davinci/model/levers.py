"""The levers of the configuration in the words of Megatron-Core's `TransformerConfig`."""

from __future__ import annotations

from typing import Any

from megatron_davinci.config import RunConfig


def lever_settings(config: RunConfig, *, transformer_engine: bool) -> dict[str, Any]:
    """What the levers set in a `TransformerConfig`.

    Args:
        config: The run configuration.
        transformer_engine: Whose layers are built.
    """
    settings: dict[str, Any] = {
        # Of a norm over all heads a tensor rank has its own weights, whose gradients are not to be summed over ranks.
        "qk_layernorm": config.model.qk_norm and config.model.qk_norm_scope == "head",
        "deterministic_mode": config.train.deterministic,
        "tp_comm_overlap": config.parallel.overlap_tensor,
        **recompute_settings(config),
        **(low_precision_settings(config) if transformer_engine else {}),
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


def low_precision_settings(config: RunConfig) -> dict[str, Any]:
    """Transformer Engine's products of few bits.

    Gradients have more range and less precision (E5M2) where a scale serves a whole tensor.
    """
    low = config.train.low_precision
    if low.recipe == "none":
        return {}
    kept: dict[str, Any] = {}
    if low.keep_first_layers or low.keep_last_layers:
        kept = {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": low.keep_first_layers,
            "num_layers_at_end_in_bf16": low.keep_last_layers,
        }
    if low.recipe == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4", **kept}
    if low.recipe == "delayed":
        kept = {"fp8_amax_history_len": low.amax_history, "fp8_amax_compute_algo": "max"}
    return {
        "fp8": "hybrid" if low.recipe in ("delayed", "current") else "e4m3",
        "fp8_recipe": low.megatron_recipe,
        "fp8_param": low.parameters,
        **kept,
    }


def start_tensor_overlap(config: RunConfig) -> None:
    """Give Transformer Engine the buffers through which tensor ranks send activations while products go on.

    After the process groups are up, on every rank.
    """
    from transformer_engine.pytorch.module import base

    tokens = config.data.sequence_length * config.train.micro_batch_size // config.parallel.context
    half = config.train.low_precision.recipe == "none"
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
