"""What a run will mix: what its journal has decided, then what its stages and the edits plan."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_davinci.config import RunConfig
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.config.transform_checks import recorded
from megatron_davinci.config.units import format_tokens
from megatron_davinci.data.journal import Journal, MixRecord
from megatron_davinci.data.places import S3Options, place
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.edits import Edit

CONFIGURATION = "configuration"
"""The origin of a record that a changed configuration made."""

DECLARED_SLACK = 0.05
"""How far a source's size may be from what the configuration declares: declarations are rounded."""


def open_sources(config: RunConfig) -> dict[str, Source]:
    """Open every training source, and check it against the model's vocabulary and the size that is declared.

    Raises:
        DataError: A source is missing, damaged, or of another size than the configuration says.
        EnvironmentProblem: A file cannot be read.
    """
    data = config.data
    s3 = S3Options(**dict(data.s3))
    sources = {
        name: Source.open(name, place(source.path, s3), data.sequence_length, vocab_size=config.model.tokens)
        for name, source in data.sources.items()
    }
    check_declared_sizes(config, sources)
    return sources


def pool_sizes(config: RunConfig, sources: Mapping[str, Source]) -> dict[str, int]:
    """Tokens by source: those that are there, and what the configuration declares of the others."""
    declared = {name: source.tokens for name, source in config.data.sources.items() if source.tokens}
    return {**declared, **{name: source.num_tokens for name, source in sources.items()}}


def check_declared_sizes(config: RunConfig, sources: Mapping[str, Source]) -> None:
    """Refuse sources that are not of the sizes that the configuration declares.

    Raises:
        DataError: With every one that is not.
    """
    differing = []
    for name, source in sources.items():
        declared = config.data.sources[name].tokens
        if declared and abs(declared - source.num_tokens) > DECLARED_SLACK * source.num_tokens:
            differing.append(
                f"data.sources.{name}.tokens: {format_tokens(declared)} as configured, "
                f"{source.num_tokens:,} in the source"
            )
    if differing:
        raise DataError(
            "A source is not of the size that the configuration was planned with.",
            where="data.sources",
            found="\n".join(differing[:12]),
            expected=f"sizes that agree to {DECLARED_SLACK:.0%}",
            do="correct `tokens` and look at `davinci plan` again, or leave it out: the source says its size itself",
        )


def stage_record(
    config: RunConfig, schedule: Schedule, stage: int, pools: Mapping[str, int]
) -> MixRecord | None:
    """The record that a stage begins with; None for a stage without a step.

    Args:
        config: The run configuration.
        schedule: Its schedule.
        stage: Number of the stage, from 0 on.
        pools: Tokens by source, of `pool_sizes`.

    Raises:
        ConfigError: A domain is divided by the sizes of its sources, and one is not known.
    """
    first, settings = schedule.stage_first_sample(stage), config.curriculum[stage]
    if first is None:
        return None
    return MixRecord(
        first_sample=first,
        stage=settings.name,
        weights=source_weights(settings, config.data, pools),
        transforms=recorded(settings, config.data),
    )


class Governing(NamedTuple):
    """A mixture, and where it is from.

    Attributes:
        record: The mixture.
        number: Of the journal's record, from 0 on; None where it is planned.
    """

    record: MixRecord
    number: int | None


def boundary_from(schedule: Schedule, sample: int) -> int | None:
    """Where the first step begins that begins at or after a sample; None where none does."""
    segments = schedule.segments
    at = bisect_right([segment.first_sample for segment in segments], sample) - 1
    if at < 0 or sample >= schedule.total_samples:
        return None
    segment = segments[at]
    steps = -(-(sample - segment.first_sample) // segment.batch)
    boundary = segment.first_sample + steps * segment.batch
    return boundary if boundary < schedule.total_samples else None


def where_change_begins(schedule: Schedule, mixes: Sequence[MixRecord], consumed: int) -> int | None:
    """The first sample that something new may govern: none before it is used, or decided; None where the run ends.

    Args:
        schedule: The run's schedule.
        mixes: The journal's mixtures.
        consumed: Samples that steps have consumed which are on record.
    """
    return boundary_from(schedule, max(consumed, mixes[-1].first_sample + 1 if mixes else 0))


def planned_records(
    config: RunConfig,
    schedule: Schedule,
    pools: Mapping[str, int],
    mixes: Sequence[MixRecord],
    edits: Sequence[Edit] = (),
    *,
    consumed: int = 0,
    changed: MixRecord | None = None,
) -> list[MixRecord]:
    """What comes after the journal's mixtures, by rising first sample, as far as anybody has planned.

    An edit holds until the next stage begins, or the next edit. At one sample, an edit goes before a change of the
    configuration, which goes before the stage's own mixture; of two edits, the one that was asked for later.

    Args:
        config: The run configuration.
        schedule: Its schedule.
        pools: Tokens by source, of `pool_sizes`.
        mixes: The journal's mixtures.
        edits: Those that are still to come.
        consumed: Samples that steps have consumed which are on record.
        changed: What a changed configuration makes of the stage that the run is in.

    Raises:
        ConfigError: A domain is divided by the sizes of its sources, and one is not known.
    """
    begun, last = {record.stage for record in mixes}, mixes[-1].first_sample if mixes else -1
    floor = where_change_begins(schedule, mixes, consumed)
    found: dict[int, MixRecord] = {}
    for stage in range(len(config.curriculum)):
        record = stage_record(config, schedule, stage, pools)
        if record is not None and record.stage not in begun and record.first_sample > last:
            found[record.first_sample] = record
    if changed is not None:
        found[changed.first_sample] = changed
    for edit in edits:
        if floor is not None and (sample := place_of(edit, schedule, floor)) is not None:
            found[sample] = replace(
                mixture_at(config, schedule, pools, sample),
                weights=dict(edit.weights),
                origin=edit.name,
                reason=edit.reason,
            )
    return [found[sample] for sample in sorted(found)]


def mixture_at(config: RunConfig, schedule: Schedule, pools: Mapping[str, int], sample: int) -> MixRecord:
    """The stage's own mixture as a record from `sample` on, where a step begins.

    Raises:
        ConfigError: A domain is divided by the sizes of its sources, and one is not known.
    """
    record = stage_record(config, schedule, schedule.at(sample).stage, pools)
    assert record is not None  # a step of the stage begins here
    return replace(record, first_sample=sample)


def governing_records(journal: Journal, planned: Sequence[MixRecord]) -> tuple[Governing, ...]:
    """The journal's mixtures with their numbers, and what is planned after them."""
    decided = (
        Governing(record, number)
        for number, record in enumerate(journal.records)
        if isinstance(record, MixRecord)
    )
    return (*decided, *(Governing(record, None) for record in planned))


def place_of(edit: Edit, schedule: Schedule, floor: int) -> int | None:
    """Where an edit takes effect, at `floor` or later; None after the end, or if its stage takes no step."""
    wanted: int | None = edit.point.sample or 0
    if edit.point.stage is not None:
        names = [stage.name for stage in schedule.stages]
        known = edit.point.stage in names
        wanted = schedule.stage_first_sample(names.index(edit.point.stage)) if known else None
    return None if wanted is None else boundary_from(schedule, max(wanted, floor))
