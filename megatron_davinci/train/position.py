"""Where a run is: what a checkpoint or a snapshot says beside the state of model and optimizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.train.order import DataOrder


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
        "precision": config.train.precision,
        "layout": asdict(layout),
        "journal": order.position() if dist.get_rank() == 0 else None,
    }
