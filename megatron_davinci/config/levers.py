"""Levers that do not go together, or not with a layout: found before anything starts, all of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_davinci.config.run import RunConfig


def lever_problems(config: RunConfig) -> list[str]:
    """What of the levers contradicts itself, whatever the number of ranks; a line each."""
    return recompute_problems(config) + decay_problems(config)


def decay_problems(config: RunConfig) -> list[str]:
    """Whether the matrices that are not to be decayed are there."""
    spared = config.optimizer.no_weight_decay
    problems = []
    if config.model.tie_embeddings and "output" in spared:
        problems.append(
            "optimizer.no_weight_decay names output, which is the embedding (model.tie_embeddings: true): "
            "write embedding"
        )
    if len(set(spared)) < len(spared):
        problems.append(f"optimizer.no_weight_decay names one twice: {', '.join(spared)}")
    return problems


def recompute_problems(config: RunConfig) -> list[str]:
    """Whether the layers of every model chunk can be recomputed as asked."""
    recompute, parallel = config.train.recompute, config.parallel
    if recompute.granularity != "full":
        return []
    if parallel.pipeline_layers is None and config.model.num_layers % parallel.chunks:
        return []  # said by check_layout
    chunks = parallel.chunk_layers(config.model.num_layers)
    if recompute.layers > max(chunks):
        return [
            f"train.recompute.layers ({recompute.layers}) is more than any pipeline stage has ({max(chunks)})"
        ]
    uneven = sorted({layers for layers in chunks if layers % recompute.layers})
    if recompute.method == "uniform" and uneven:
        return [
            f"train.recompute.layers ({recompute.layers}) does not divide the layers of a pipeline stage "
            f"({', '.join(map(str, uneven))}): method uniform cuts them into equal runs"
        ]
    return []
