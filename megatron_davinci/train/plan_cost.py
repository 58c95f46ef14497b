"""What a plan costs on given GPUs: hours, wall time, and space for checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_davinci.config import RunConfig
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Attributes:
        name: As it is asked for.
        teraflops: Dense bf16 matrix products, 10^12 a second.
        memory_gib: Memory.
    """

    name: str
    teraflops: float
    memory_gib: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312, 80),
        Gpu("a100-40gb", 312, 40),
        Gpu("l40s", 362, 48),
        Gpu("h100", 989, 80),
        Gpu("h200", 989, 141),
        Gpu("b200", 2250, 180),
    )
}
"""By name; SXM modules where there are several. From NVIDIA's data sheets, without sparsity."""


@dataclass(frozen=True)
class Cost:
    """What a number of FLOPs takes.

    Attributes:
        flops: Of the model, without what is computed again.
        gpu_hours: On all GPUs together.
        wall_hours: On the clock.
    """

    flops: float
    gpu_hours: float
    wall_hours: float


def choose_gpu(name: str, peak_teraflops: float | None, memory_gib: float | None) -> Gpu:
    """A GPU by name, with what is said beside it.

    Raises:
        ConfigError: There is no such name.
    """
    if name.lower() not in GPUS:
        raise ConfigError(
            "There is no data sheet of this GPU.",
            where="--gpu",
            found=name,
            expected=", ".join(GPUS),
            do="name one of these, or give --peak-tflops and --gpu-memory",
        )
    gpu = GPUS[name.lower()]
    return Gpu(
        gpu.name if peak_teraflops is None else f"{peak_teraflops:g} TFLOP/s",
        gpu.teraflops if peak_teraflops is None else peak_teraflops,
        gpu.memory_gib if memory_gib is None else memory_gib,
    )


def cost(flops: float, gpu: Gpu, mfu: float, ranks: int) -> Cost:
    """What a number of FLOPs takes.

    Args:
        flops: Of the model (`flops_per_token` times tokens).
        gpu: What it runs on.
        mfu: Model FLOPs utilization: the share of the peak that becomes model FLOPs, 0 to 1.
        ranks: How many GPUs.
    """
    hours = flops / (gpu.teraflops * 1e12 * mfu) / 3600
    return Cost(flops, hours, hours / ranks)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: weights in the training precision; main weights and both moments in fp32."""
    size = 4 if config.train.precision == "fp32" else 2
    return config.model.parameters() * (size + 12)


def checkpoint_space(config: RunConfig) -> int:
    """Bytes that checkpoints take at the most: those that are kept, and the one that is being written."""
    return checkpoint_bytes(config) * (checkpoints_kept(config) + 1)


def checkpoints_kept(config: RunConfig) -> int:
    """How many checkpoints are kept in the end, at the most: the newest, the best, and those that stay forever."""
    kept, every = config.checkpoint, config.checkpoint.every_steps
    forever = 0
    if kept.keep_every is not None and every is not None:
        steps = Schedule(config.curriculum, config.data.sequence_length).total_steps
        forever = steps // math.lcm(kept.keep_every, every)
    return kept.keep + kept.keep_best + forever
