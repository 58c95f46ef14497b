"""What a configuration will cost, computed and not measured: parameters, FLOPs, steps, data, memory, hours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_davinci.config import Layout, RunConfig, check_layout
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.laws import step_law
from megatron_davinci.train.memory import MemoryPlan, plan_memory, snapshot_bytes
from megatron_davinci.train.plan_cost import GPUS, Cost, Gpu, checkpoint_bytes, checkpoint_space, cost
from megatron_davinci.train.plan_sources import SourcePlan, plan_sources, planned_order, warnings_of

MFU = 0.4
"""Model FLOPs utilization that is assumed where none is given."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, as it will run.

    Attributes:
        name: Its name.
        tokens: Tokens it takes; its target rounded up to a step.
        samples: Sequences it takes.
        steps: Steps it takes.
        first_sample: Samples of the run before it.
        batch: Global batch sizes in order, in sequences.
        learning_rate: Of its first and of its last step.
        source_tokens: Tokens it takes from each source that it takes any from.
        domain_tokens: The same by domain.
        cost: What it takes on the GPUs.
    """

    name: str
    tokens: int
    samples: int
    steps: int
    first_sample: int
    batch: list[int]
    learning_rate: tuple[float, float]
    source_tokens: dict[str, int]
    domain_tokens: dict[str, int]
    cost: Cost


@dataclass(frozen=True)
class RunPlan:
    """A whole run.

    Attributes:
        parameters: All of the model's.
        parameters_without_embeddings: Without the embedding and the output matrix.
        parameters_active: Those that a token passes: all but the experts that it is not sent to.
        flops_per_token: Forward and backward; attention counted causally.
        total_tokens: Of all stages.
        total_samples: Of all stages.
        total_steps: Of all stages.
        stages: Each stage.
        sources: Each source.
        warnings: What a reader should know first.
        layout: The ranks.
        memory: Of the fullest rank.
        gpu: What hours are counted for.
        mfu: At what share of its peak.
        cost: Of the whole run.
        step_law: Peak learning rate and tokens a batch by the Step Law, for this model and these tokens.
        checkpoint_bytes: Of one checkpoint.
        checkpoint_space: Of those that are kept, and the one that is written.
        snapshot_bytes: Host memory of the fullest rank's snapshots, with parity over `snapshots.parity_nodes` nodes.
    """

    parameters: int
    parameters_without_embeddings: int
    parameters_active: int
    flops_per_token: int
    total_tokens: int
    total_samples: int
    total_steps: int
    stages: list[StagePlan]
    sources: list[SourcePlan]
    warnings: list[str]
    layout: Layout
    memory: MemoryPlan
    gpu: Gpu
    mfu: float
    cost: Cost
    step_law: tuple[float, float]
    checkpoint_bytes: int
    checkpoint_space: int
    snapshot_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values, and the steps of each stage by name: `steps_1_1` for stage 1-1."""
        plain = asdict(self)
        plain["memory"]["total"] = self.memory.total
        for stage in self.stages:
            plain["steps_" + "".join(c if c.isalnum() else "_" for c in stage.name)] = stage.steps
        return plain


def plan_run(config: RunConfig, ranks: int, gpu: Gpu = GPUS["h100"], mfu: float = MFU) -> RunPlan:
    """Plan a run on `ranks` ranks. Of the data, manifests are read where there are any; nothing is started.

    Args:
        config: The run configuration.
        ranks: GPUs.
        gpu: What they are.
        mfu: Model FLOPs utilization, 0 to 1.

    Raises:
        ConfigError: The layout does not divide, a source would repeat beyond its cap, or a size that divides a domain
            is not known.
        DataError: A source that is there is damaged, or of another size than the configuration declares.
    """
    layout = check_layout(config, ranks)
    model, length = config.model, config.data.sequence_length
    schedule = Schedule(config.curriculum, length)
    order, pools, known = planned_order(config, schedule)
    sources = plan_sources(config, schedule, order, pools, known)
    flops, total = model.flops_per_token(length), schedule.total_samples * length
    without_embeddings = model.parameters(embeddings=False)
    memory = plan_memory(config, layout)
    stages = [
        _stage_plan(
            config, schedule, number, sources, cost_of=lambda tokens: cost(flops * tokens, gpu, mfu, ranks)
        )
        for number in range(len(config.curriculum))
    ]
    return RunPlan(
        parameters=model.parameters(),
        parameters_without_embeddings=without_embeddings,
        parameters_active=model.parameters(active=True),
        flops_per_token=flops,
        total_tokens=total,
        total_samples=schedule.total_samples,
        total_steps=schedule.total_steps,
        stages=stages,
        sources=sources,
        warnings=warnings_of(config, schedule, sources),
        layout=layout,
        memory=memory,
        gpu=gpu,
        mfu=mfu,
        cost=cost(flops * total, gpu, mfu, ranks),
        step_law=step_law(without_embeddings, total),
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoint_space=checkpoint_space(config),
        snapshot_bytes=snapshot_bytes(config, memory),
    )


def _stage_plan(
    config: RunConfig, schedule: Schedule, number: int, sources: list[SourcePlan], cost_of: Any
) -> StagePlan:
    segments = schedule.stage_segments(number)
    samples = sum(segment.steps * segment.batch for segment in segments)
    ends, first = (0.0, 0.0), schedule.total_samples
    if segments:
        last, first = segments[-1], segments[0].first_sample
        ends = (
            schedule.at(first).learning_rate,
            schedule.at(last.end_sample - last.batch).learning_rate,
        )
    taken = {source.name: source.tokens[number] for source in sources if source.tokens[number]}
    domains: dict[str, int] = {}
    for name, tokens in taken.items():
        domain = config.data.domain(name)
        domains[domain] = domains.get(domain, 0) + tokens
    tokens = samples * config.data.sequence_length
    return StagePlan(
        name=config.curriculum[number].name,
        tokens=tokens,
        samples=samples,
        steps=sum(segment.steps for segment in segments),
        first_sample=first,
        batch=[segment.batch for segment in segments],
        learning_rate=ends,
        source_tokens=taken,
        domain_tokens=domains,
        cost=cost_of(tokens),
    )
