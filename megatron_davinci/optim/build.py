"""Megatron-Core's optimizer for our parameters: sharded or not, fp32 or bf16 with fp32 main weights."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_davinci.config import RunConfig
from megatron_davinci.optim import dealt
from megatron_davinci.optim.adamw import GroupAdamW
from megatron_davinci.optim.davinci import DavinciAdamW, DavinciAdamWFP8Moments
from megatron_davinci.optim.decay import decay_overrides
from megatron_davinci.optim.inner import join
from megatron_davinci.optim.muon import Muon
from megatron_davinci.optim.muon import join as join_muon
from megatron_davinci.platform.backends import choose_backends
from megatron_davinci.platform.megatron_patches import use_adam


def build_optimizer(config: RunConfig, chunks: list[Any]) -> Any:
    """Build the optimizer of this rank's model chunks.

    What is not decayed (`optim.decay`) is in a group of its own, said by `wd_mult` of each group, which
    `set_hyperparameters` honours.

    Args:
        config: The run configuration.
        chunks: Model chunks wrapped in Megatron-Core's `DistributedDataParallel`.
    """
    on_cuda, settings = next(chunks[0].parameters()).is_cuda, config.optimizer
    low = config.train.low_precision
    name = choose_backends(on_cuda=on_cuda, **config.backend_arguments()).optimizer.name
    use_adam(
        _muon(config) if settings.kind == "muon" else _adam(name, settings.moments),
        transformer_engine=name == "transformer_engine",
    )
    mcore = OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before each step from the schedule
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=0.0 if name == "davinci" else settings.clip_grad_norm,  # ours clips in its update
        bf16=config.train.precision == "bf16",
        use_distributed_optimizer=config.cuts_optimizer,
        overlap_param_gather=config.parallel.overlap_parameter_gather,
        **_offload(config),
        fp8_recipe=low.megatron_recipe if low.parameters else None,
        reuse_grad_buf_for_mxfp8_param_ag=low.parameters and low.recipe == "mxfp8",
    )
    optimizer = get_megatron_optimizer(mcore, chunks, config_overrides=decay_overrides(config, mcore))
    if settings.kind == "muon":
        join_muon(optimizer, chunks, settings.muon)
        if config.parallel.distributed_optimizer:
            dealt.join(optimizer)
    elif name == "davinci":
        join(optimizer, settings.clip_grad_norm, chunks[0].config)  # of all chunks
    return optimizer


def _muon(config: RunConfig) -> type[Muon]:
    return dealt.DealtMuon if config.parallel.distributed_optimizer else Muon


def _adam(name: str, moments: str) -> Any:
    """The class that a name of `backends.optimizer` stands for."""
    if name == "davinci":
        return DavinciAdamWFP8Moments if moments == "fp8" else DavinciAdamW
    if name == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam
    if name == "apex":
        from apex.optimizers import FusedAdam as ApexAdam

        return ApexAdam
    return GroupAdamW


def _offload(config: RunConfig) -> dict[str, Any]:
    """State in the CPU's memory, by Megatron-Core's `HybridDeviceOptimizer`, which is built on the second setting."""
    fraction = config.optimizer.cpu_offload
    if not fraction:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "use_precision_aware_optimizer": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def set_hyperparameters(optimizer: Any, *, learning_rate: float, weight_decay: float) -> None:
    """Set what the next update uses."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
