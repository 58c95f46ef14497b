"""The levers of the configuration in the words of Megatron-Core's `TransformerConfig`."""

from __future__ import annotations

from typing import Any

from megatron_davinci.config import RunConfig


def lever_settings(config: RunConfig) -> dict[str, Any]:
    """What the levers set in a `TransformerConfig`."""
    return {"qk_layernorm": config.model.qk_norm, **recompute_settings(config)}


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
