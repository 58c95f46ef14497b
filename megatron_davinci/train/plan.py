"""What a configuration will cost, computed and not measured: parameters, FLOPs, steps, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from megatron_davinci.config import Layout, RunConfig, check_layout
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.memory import MemoryPlan, plan_memory
from megatron_davinci.train.planned import pool_sizes


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
class RunPlan:
    """A whole run."""

    parameters: int
    parameters_without_embeddings: int
    parameters_active: int
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
        parameters_active=model.parameters(active=True),
        flops_per_token=model.flops_per_token(length),
        total_tokens=schedule.total_samples * length,
        total_samples=schedule.total_samples,
        total_steps=schedule.total_steps,
        stages=stages,
        layout=layout,
        memory=plan_memory(config, layout),
    )
