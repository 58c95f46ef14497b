"""Layouts of a model over given GPUs that fit their memory, ranked by an estimate of the step time.

The estimate is a ranking, not a forecast. Of one step on one GPU it adds up

- compute: the model's FLOPs over the peak times the utilization; full recomputation adds a forward pass, a third;
- bubble: `(p - 1) / (v m)` of that, for `p` pipeline ranks, `v` chunks a rank and `m` micro-batches (Narayanan et al.
  2021, arXiv 2104.04473);
- communication, of which only data parallelism's is hidden behind the backward pass, and only with
  `parallel.overlap_gradient_reduce`: tensor parallelism reduces `4 (t - 1) / t * 2` hidden states a layer and
  micro-batch, context parallelism passes keys and values around twice, pipelines pass hidden states on, and data
  parallelism sends gradients in fp32 and takes weights back.

Groups that fit one node of eight talk at `NODE` bytes a second, others at `NETWORK`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.config.layout_problems import layout_problems
from megatron_davinci.config.levers import lever_problems
from megatron_davinci.train.memory import plan_memory
from megatron_davinci.train.plan_cost import Gpu

NODE, NETWORK, NODE_GPUS = 360e9, 45e9, 8
"""Bytes a second that a GPU reaches inside a node (NVLink) and between nodes (400 Gbit/s), and GPUs a node."""

ROOM = 0.9
"""The share of a GPU's memory that the estimate may fill; the rest is the device's context, NCCL and fragments."""


@dataclass(frozen=True)
class Suggested:
    """A layout that fits.

    Attributes:
        layout: The ranks.
        memory: Bytes of the fullest rank.
        seconds: Estimated time of a step of the largest batch.
        bubble: The share of the compute time that pipeline ranks wait.
        communication: Bytes that a GPU sends a step.
        overrides: What differs, as it is written on a command line.
    """

    layout: Layout
    memory: int
    seconds: float
    bubble: float
    communication: int
    overrides: str


def suggest(config: RunConfig, ranks: int, gpu: Gpu, mfu: float, most: int = 5) -> list[Suggested]:
    """The layouts with the lowest estimate that fit `ROOM` of the GPU's memory, at most `most`."""
    found = []
    for candidate in _candidates(config, ranks):
        if layout_problems(candidate, ranks) or lever_problems(candidate):
            continue
        parallel = candidate.parallel
        data = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
        layout = Layout(
            ranks, parallel.tensor, parallel.pipeline, data, parallel.context, parallel.virtual_pipeline,
            parallel.expert, parallel.expert_tensor,
        )  # fmt: skip
        memory = plan_memory(candidate, layout).total
        if memory <= ROOM * gpu.memory_gib * 2**30:
            found.append(_estimated(config, candidate, layout, memory, gpu, mfu))
    return sorted(found, key=lambda one: (one.seconds, one.overrides))[:most]


def _candidates(config: RunConfig, ranks: int) -> Iterator[RunConfig]:
    powers = [2**n for n in range(8)]
    tensors = [t for t in powers[:4] if config.model.num_attention_heads % t == 0]
    pipelines = [p for p in (1, 2, 3, 4, 6, 8, 9, 12, 16) if p <= min(ranks, config.model.num_layers)]
    contexts = powers[:4] if config.data.sequence_length >= 8192 else [1, 2]
    for t, p, v, c, micro, recompute in itertools.product(
        tensors, pipelines, (1, 2, 3), contexts, (1, 2, 4, 8), ("none", "full")
    ):
        if ranks % (t * p * c) or (v > 1 and p == 1):
            continue
        parallel = config.parallel.model_copy(
            update={
                "tensor": t, "sequence": t > 1, "pipeline": p, "virtual_pipeline": v, "context": c,
                "pipeline_layers": None,
            }
        )  # fmt: skip
        again = config.train.recompute.model_copy(update={"granularity": recompute})
        train = config.train.model_copy(update={"micro_batch_size": micro, "recompute": again})
        yield config.model_copy(update={"parallel": parallel, "train": train})


def _estimated(
    config: RunConfig, candidate: RunConfig, layout: Layout, memory: int, gpu: Gpu, mfu: float
) -> Suggested:
    model, length, micro = config.model, config.data.sequence_length, candidate.train.micro_batch_size
    size = 4 if config.train.precision == "fp32" else 2
    batch = max(phase.size for stage in config.curriculum for phase in stage.global_batch_size)
    micro_batches = batch // (micro * layout.data)
    compute = model.flops_per_token(length) * batch * length / layout.world / (gpu.teraflops * 1e12 * mfu)
    if candidate.train.recompute.granularity == "full":
        compute *= 4 / 3
    bubble = (layout.pipeline - 1) / (layout.virtual_pipeline * micro_batches)
    hidden = micro * length // layout.context * model.hidden_size * size
    layers = model.num_layers / layout.pipeline
    tensor = 4 * layers * hidden * 2 * (layout.tensor - 1) / layout.tensor * micro_batches
    kv = 2 * model.num_query_groups * model.kv_channels / layout.tensor * micro * length * size
    context = 2 * layers * kv * (layout.context - 1) / layout.context * micro_batches
    passed = 2 * hidden * layout.virtual_pipeline * micro_batches * (layout.pipeline > 1)
    own = model.parameters() / layout.tensor / layout.pipeline
    copies = layout.data * layout.context
    data = own * (4 + size) * (copies - 1) / copies
    inner = layout.tensor * layout.context
    near = NODE if inner <= NODE_GPUS else NETWORK
    seconds = compute * (1 + bubble) + (tensor + context) / near
    seconds += passed / (NODE if inner * layout.pipeline <= NODE_GPUS else NETWORK)
    reduce = data / (NODE if layout.world <= NODE_GPUS else NETWORK)
    seconds += max(0.0, reduce - compute * 2 / 3) if config.parallel.overlap_gradient_reduce else reduce
    return Suggested(
        layout,
        memory,
        seconds,
        bubble,
        round(tensor + context + passed + data),
        _overrides(config, candidate),
    )


def _overrides(config: RunConfig, candidate: RunConfig) -> str:
    values: list[tuple[str, Any, Any]] = [
        (f"parallel.{name}", getattr(config.parallel, name), getattr(candidate.parallel, name))
        for name in ("tensor", "sequence", "pipeline", "virtual_pipeline", "pipeline_layers", "context")
    ]
    values.append(("train.micro_batch_size", config.train.micro_batch_size, candidate.train.micro_batch_size))
    before, after = config.train.recompute.granularity, candidate.train.recompute.granularity
    values.append(("train.recompute.granularity", before, after))
    return " ".join(f"{key}={_yaml(new)}" for key, old, new in values if old != new) or "(as configured)"


def _yaml(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
