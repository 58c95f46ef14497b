"""Megatron-Core's optimizer for our parameters: sharded or not, fp32 or bf16 with fp32 main weights."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_davinci.config import RunConfig
from megatron_davinci.optim.adamw import GroupAdamW
from megatron_davinci.optim.decay import decay_overrides
from megatron_davinci.platform.megatron_patches import use_adam


def build_optimizer(config: RunConfig, chunks: list[Any]) -> Any:
    """Build the optimizer of this rank's model chunks.

    What is not decayed (`optim.decay`) is in a group of its own, said by `wd_mult` of each group, which
    `set_hyperparameters` honours.

    Args:
        config: The run configuration.
        chunks: Model chunks wrapped in Megatron-Core's `DistributedDataParallel`.
    """
    use_adam(GroupAdamW)
    settings = config.optimizer
    mcore = OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before each step from the schedule
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad_norm,
        bf16=config.train.precision == "bf16",
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return get_megatron_optimizer(mcore, chunks, config_overrides=decay_overrides(config, mcore))


def set_hyperparameters(optimizer: Any, *, learning_rate: float, weight_decay: float) -> None:
    """Set what the next update uses."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
