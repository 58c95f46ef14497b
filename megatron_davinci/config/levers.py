"""Levers that do not go together, or not with a layout: found before anything starts, all of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_davinci.config.run import RunConfig


def lever_problems(config: RunConfig) -> list[str]:
    """What of the levers contradicts itself, whatever the number of ranks; a line each."""
    return recompute_problems(config)


def recompute_problems(config: RunConfig) -> list[str]:
    """Whether the layers of a pipeline stage can be recomputed as asked."""
    recompute, pipeline = config.train.recompute, config.parallel.pipeline
    if recompute.granularity != "full" or config.model.num_layers % pipeline:
        return []
    layers = config.model.num_layers // pipeline
    if recompute.layers > layers:
        return [f"train.recompute.layers ({recompute.layers}) is more than a pipeline stage has ({layers})"]
    if recompute.method == "uniform" and layers % recompute.layers:
        return [
            f"train.recompute.layers ({recompute.layers}) does not divide the layers of a pipeline stage "
            f"({layers}): method uniform cuts them into equal runs"
        ]
    return []
