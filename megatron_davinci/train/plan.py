"""What a configuration will cost, computed and not measured: parameters, FLOPs, steps, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from megatron_davinci.config import Layout, RunConfig, check_layout
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.forecast import pool_sizes


@dataclass(frozen=True)
class StagePlan:
    """One stage, as it will run.

    Attributes:
        name: Its name.
        tokens: Tokens it takes; its target rounded up to a step.
        samples: Sequences it takes.
        steps: Steps it takes.
        batch: Global batch sizes in order, in sequences.
        learning_rate: Of its first and of its last step.
        source_tokens: Tokens it takes from each source.
    """

    name: str
    tokens: int
    samples: int
    steps: int
    batch: list[int]
    learning_rate: tuple[float, float]
    source_tokens: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest rank: of the first or the last pipeline stage. Activations and logits are estimates.

    Attributes:
        weights: In the training precision.
        gradients: In fp32.
        optimizer: Both moments, and fp32 main weights under bf16.
        activations: Kept for the backward pass, without recomputation.
        logits: And their fp32 copy in the loss.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class RunPlan:
    """A whole run."""

    parameters: int
    parameters_without_embeddings: int
    flops_per_token: int
    total_tokens: int
    total_samples: int
    total_steps: int
    stages: list[StagePlan]
    layout: Layout
    memory: MemoryPlan

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        plain = asdict(self)
        plain["memory"]["total"] = self.memory.total
        return plain


def plan_run(config: RunConfig, ranks: int) -> RunPlan:
    """Plan a run on `ranks` ranks. Nothing is opened or started.

    Raises:
        ConfigError: The layout does not divide.
    """
    layout = check_layout(config, ranks)
    model, length = config.model, config.data.sequence_length
    schedule = Schedule(config.curriculum, length)
    pools = pool_sizes(config, {})
    stages = []
    for index, stage in enumerate(config.curriculum):
        segments = schedule.stage_segments(index)
        samples = sum(segment.steps * segment.batch for segment in segments)
        ends = (0.0, 0.0)
        if segments:
            last = segments[-1]
            ends = (
                schedule.at(segments[0].first_sample).learning_rate,
                schedule.at(last.end_sample - last.batch).learning_rate,
            )
        stages.append(
            StagePlan(
                name=stage.name,
                tokens=samples * length,
                samples=samples,
                steps=sum(segment.steps for segment in segments),
                batch=[segment.batch for segment in segments],
                learning_rate=ends,
                source_tokens={
                    source: round(samples * length * Fraction(weight))
                    for source, weight in source_weights(stage, config.data, pools).items()
                },
            )
        )
    return RunPlan(
        parameters=model.parameters(),
        parameters_without_embeddings=model.parameters(embeddings=False),
        flops_per_token=model.flops_per_token(length),
        total_tokens=schedule.total_samples * length,
        total_samples=schedule.total_samples,
        total_steps=schedule.total_steps,
        stages=stages,
        layout=layout,
        memory=plan_memory(config, layout),
    )


def plan_memory(config: RunConfig, layout: Layout) -> MemoryPlan:
    """Estimate the memory of the fullest rank.

    Activations are counted tensor by tensor as our layer saves them (no score matrix, no recomputation): for each
    token the inputs of both norms and of the four projections, queries, keys, values, the attention's output,
    both halves of the first MLP projection, its activation and the product. Pipeline rank `r` of `P` holds `P - r`
    micro-batches of its layers; interleaved, `2 * (P - r) - 1` and `P` for each chunk but one of a chunk's layers
    (Narayanan et al., 2021). The last has the logits too.
    """
    return max(
        (_plan_stage(config, layout, rank) for rank in range(layout.pipeline)),
        key=lambda memory: memory.total,
    )


def _plan_stage(config: RunConfig, layout: Layout, rank: int) -> MemoryPlan:
    """The memory of a pipeline rank."""
    model, length = config.model, config.data.sequence_length
    size = 4 if config.train.precision == "fp32" else 2  # auto is bf16 where memory is short
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    first, last = rank == 0, rank == layout.pipeline - 1
    chunks = config.parallel.chunk_layers(model.num_layers)[rank :: layout.pipeline]
    layer = (model.parameters(embeddings=False) - h) // model.num_layers
    parameters = layer * sum(chunks) // layout.tensor
    if first or last:
        both = first and last and not model.tie_embeddings
        parameters += (2 if both else 1) * model.vocab_size * h // layout.tensor
    sharded = layout.data * layout.context if config.parallel.distributed_optimizer else 1
    tokens = length * config.train.micro_batch_size // layout.context
    sequence_split = layout.tensor if config.parallel.sequence else 1
    # Split over tensor ranks: q, k, v, the attention's output, the MLP's two halves, activation and product.
    split = (2 * model.num_attention_heads + 2 * model.num_query_groups) * d + 4 * f
    # Context-parallel ranks have the keys and values of the whole sequence.
    split += 2 * model.num_query_groups * d * (layout.context - 1)
    # Whole on each tensor rank, unless the sequence is split: norm inputs and projection inputs.
    whole = 4 * h
    in_flight = layout.pipeline - rank
    if len(chunks) > 1:
        in_flight = 2 * in_flight - 1 + (len(chunks) - 1) * layout.pipeline
    layers_kept = in_flight * max(chunks) if len(chunks) > 1 else in_flight * sum(chunks)
    activations = tokens * layers_kept * size * (split // layout.tensor + whole // sequence_split)
    vocabulary = model.vocab_size // layout.tensor
    return MemoryPlan(
        weights=parameters * size,
        gradients=parameters * 4,
        optimizer=parameters * (8 + (4 if size == 2 else 0)) // sharded,
        activations=activations,
        logits=tokens * vocabulary * (size + 4) if last else 0,
    )
