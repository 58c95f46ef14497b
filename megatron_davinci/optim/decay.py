"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from megatron_davinci.config import RunConfig


def decay_overrides(config: RunConfig, mcore: MegatronOptimizerConfig) -> dict[ParamKey, Any]:
    """Megatron-Core's overrides for parameter groups: no decay of one-dimensional parameters and of what is named.

    Args:
        config: The run configuration.
        mcore: Megatron-Core's configuration of the optimizer.
    """
    from megatron.core.optimizer import get_standard_config_overrides

    overrides: dict[ParamKey, Any] = get_standard_config_overrides(mcore)
    names: dict[str, tuple[str, ...]] = {
        "embedding": ("embedding.word_embeddings.weight",),
        "output": ("output_layer.weight",),
    }
    if config.model.tie_embeddings:
        # On the last of several pipeline ranks the tied matrix is there a second time, as the output's.
        names["embedding"] += names["output"]
    spared = tuple(name for which in config.optimizer.no_weight_decay for name in names[which])
    if spared:
        predicate = ParamWithNamePredicate(name="spared", fn=lambda parameter, name: name.endswith(spared))
        overrides[ParamKey(with_name_predicate=predicate)] = {"wd_mult": 0.0}
    return overrides
