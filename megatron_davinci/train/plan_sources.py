"""What a run takes of each source, stage by stage, and what of that deserves a warning. Exact, by the data order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_davinci.config import RunConfig
from megatron_davinci.config.source_weights import mixed_sources
from megatron_davinci.config.units import format_tokens
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.manifest import FILE_NAME
from megatron_davinci.data.source import Source
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.laws import fresh_equivalent, last_pass_worth
from megatron_davinci.train.planned import check_declared_sizes, pool_sizes, stage_record
from megatron_davinci.train.repetition import check_caps

_UNKNOWN = 1 << 40  # windows of a source that nothing says the size of: it never runs out
MANY, TOO_MANY = 2, 4


@dataclass(frozen=True)
class SourcePlan:
    """What a run takes of one source.

    Attributes:
        name: Of the source.
        domain: Its domain.
        pool: Its tokens; None where no manifest and no declaration says it.
        known_from: `manifest`, `config` or `nothing`: who says the size.
        tokens: Taken by each stage.
        epochs: Passes through it from the run's beginning to each stage's end; None where the size is not known.
    """

    name: str
    domain: str
    pool: int | None
    known_from: str
    tokens: list[int]
    epochs: list[float] | None


def planned_order(config: RunConfig, schedule: Schedule) -> tuple[Curriculum, dict[str, int], dict[str, str]]:
    """The data order that the configuration plans, on the sources that are there and on declared sizes of the others.

    Returns:
        The order; tokens by source, where they are known; and who says them: `manifest` or `config`.

    Raises:
        ConfigError: A domain is divided by sizes, and one is not known; or a source would repeat beyond its cap.
        DataError: A source that is there is damaged, or of another size than the configuration declares.
    """
    there = _open_local(config)
    check_declared_sizes(config, there)
    pools = pool_sizes(config, there)
    length = config.data.sequence_length
    windows = {
        name: there[name].num_windows
        if name in there
        else max(1, (pools[name] - 1) // length)
        if name in pools
        else _UNKNOWN
        for name in config.data.sources
    }
    records = [stage_record(config, schedule, stage, pools) for stage in range(len(config.curriculum))]
    order = Curriculum(windows, config.run.seed, [record for record in records if record is not None])
    check_caps(config, schedule, order)
    return order, pools, {name: "manifest" if name in there else "config" for name in pools}


def _open_local(config: RunConfig) -> dict[str, Source]:
    """The sources that are on this machine. What lies in S3 is not asked for: a plan waits for no network."""
    found = {}
    for name, source in config.data.sources.items():
        path = source.path
        if not isinstance(path, Path):
            continue
        if (path / FILE_NAME).exists() or Path(f"{path}.idx").exists():
            found[name] = Source.open(name, path, config.data.sequence_length, vocab_size=config.model.tokens)
    return found


def plan_sources(
    config: RunConfig,
    schedule: Schedule,
    order: Curriculum,
    pools: Mapping[str, int],
    known: Mapping[str, str],
) -> list[SourcePlan]:
    """What is taken of each source, in the configuration's order. Arguments as `planned_order` gives them."""
    length = config.data.sequence_length
    ends: list[int] = []
    for stage in range(len(config.curriculum)):
        segments = schedule.stage_segments(stage)
        ends.append(segments[-1].end_sample if segments else ends[-1] if ends else 0)
    consumed = [order.consumed(end) for end in ends]
    before = [dict.fromkeys(order.sources, 0), *consumed[:-1]]
    windows = order.windows
    return [
        SourcePlan(
            name=name,
            domain=config.data.domain(name),
            pool=pools.get(name),
            known_from=known.get(name, "nothing"),
            tokens=[
                (after[name] - first[name]) * length for first, after in zip(before, consumed, strict=True)
            ],
            epochs=[after[name] / windows[name] for after in consumed] if name in pools else None,
        )
        for name in config.data.sources
    ]


def warnings_of(config: RunConfig, schedule: Schedule, sources: list[SourcePlan]) -> list[str]:
    """What a reader should know of the sources and the stages before the run, the gravest first."""
    stages = config.curriculum
    grave: list[str] = []
    notable, small = schedule.cut_rates(), list[str]()
    for names, plan in _alike(sources):
        epochs = plan.epochs
        if not any(plan.tokens):
            continue
        if epochs is None:
            small.append(
                f"{names}: no manifest and no data.sources.NAME.tokens says the size; epochs are not known"
            )
            continue
        total = epochs[-1]
        text, out = "", next((stages[i].name for i, passes in enumerate(epochs) if passes > 1), None)
        if out is not None:
            text = f"{names}: runs out in stage {out}; {_passes(epochs, [stage.name for stage in stages])}"
            if total > MANY:
                text += (
                    f"; worth {fresh_equivalent(total):.2f} passes of new text, a token of the last pass "
                    f"{last_pass_worth(total):.0%} of a new one (Muennighoff et al. 2023)"
                )
        if total > TOO_MANY:
            grave.append(f"REPEATED MORE THAN {TOO_MANY} TIMES: {text}")
        elif total > MANY:
            notable.append(text)
        elif out is not None:
            small.append(text)
    taken = {source.name: source.tokens for source in sources}
    for number, stage in enumerate(stages):
        if not schedule.stage_segments(number):
            grave.append(f"stage {stage.name} has no step: the batch before it reaches past its end")
            continue
        none = [name for name in mixed_sources(stage, config.data) if not taken[name][number]]
        if none:
            grave.append(
                f"{', '.join(none)}: no sample in the whole of stage {stage.name}; the share is too small"
            )
    unused = [source.name for source in sources if not any(source.tokens)]
    if unused:
        small.append(f"{', '.join(unused)}: in data.sources, and no stage takes from it")
    return grave + notable + small


def _passes(epochs: list[float], stages: list[str]) -> str:
    """Passes at the run's end, and how the stages that repeat come to them."""
    parts = []
    for number, passes in enumerate(epochs):
        own = passes - (epochs[number - 1] if number else 0.0)
        if own >= 0.005:
            parts.append(f"{own:.2f} in {stages[number]}")
    return f"{epochs[-1]:.2f} passes ({', '.join(parts)})"


def _alike(sources: list[SourcePlan]) -> list[tuple[str, SourcePlan]]:
    """Sources of a domain that are passed through equally often, as one line."""
    groups: dict[object, list[SourcePlan]] = {}
    for source in sources:
        passes = source.epochs and tuple(f"{value:.2f}" for value in source.epochs)
        groups.setdefault((source.domain, passes, any(source.tokens)), []).append(source)
    found = []
    for group in groups.values():
        pool = sum(source.pool or 0 for source in group)
        size = f" ({format_tokens(pool)})" if pool else ""
        names = ", ".join(source.name for source in group[:3])
        if len(group) > 3:
            names = f"{len(group)} sources of {group[0].domain} ({names}, ...)"
        found.append((names + size, group[0]))
    return found
