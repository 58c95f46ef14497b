"""What a run writes of itself: where it is, in checkpoints and snapshots, and what it is, in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.data.source import Source
from megatron_davinci.platform.device import Platform
from megatron_davinci.train.order import DataOrder
from megatron_davinci.train.planned import pool_sizes
from megatron_davinci.train.run_directory import command_line


def position(
    config: RunConfig, layout: Layout, order: DataOrder, step: int, consumed_samples: int
) -> dict[str, Any]:
    """Describe the present step of a run; only rank 0 has a journal to say the place of.

    Args:
        config: The run configuration.
        layout: The ranks.
        order: The run's data order.
        step: Steps taken.
        consumed_samples: Samples consumed.
    """
    return {
        "step": step,
        "consumed_samples": consumed_samples,
        "consumed_tokens": consumed_samples * config.data.sequence_length,
        "model": config.model.model_dump(mode="json"),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "optimizer": config.optimizer.kind,
        "precision": config.train.precision,
        "low_precision": config.train.low_precision.description,
        "layout": asdict(layout),
        "journal": order.position() if dist.get_rank() == 0 else None,
    }


def facts_of(config: RunConfig, sources: Mapping[str, Source]) -> dict[str, Any]:
    """What decides a run and its data order, for `manifest.json`.

    Args:
        config: The run configuration.
        sources: Its sources.
    """
    model = config.model
    return {
        "seed": config.run.seed,
        "sequence_length": config.data.sequence_length,
        "data_fingerprints": {name: source.fingerprint for name, source in sources.items()},
        "windows": {name: source.num_windows for name, source in sources.items()},
        "pools": pool_sizes(config, dict(sources)),
        "model": {
            "parameters": model.parameters(),
            **model.model_dump(mode="json", exclude={"preset"}),
        },
    }


def start_of(config: RunConfig, layout: Layout, platform: Platform, step: int) -> dict[str, Any]:
    """What may differ between the starts of a run.

    Args:
        config: The run configuration.
        layout: The ranks.
        platform: What this start computes on.
        step: What it goes on from.
    """
    return {
        "step": step,
        "device": platform.describe(),
        "ranks": layout.world,
        "layout": str(layout),
        "precision": config.train.precision,
        "command": command_line(),
    }
