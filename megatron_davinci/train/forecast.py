"""The data order of a run, read from its configuration and its directory; nothing is started and nothing written.

Here is what the trainer and whoever only asks must agree on. It needs no torch, so that an answer takes no seconds.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.config import Layout, RunConfig, check_layout
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.config.transform_checks import recorded
from megatron_davinci.config.units import format_tokens
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
from megatron_davinci.data.places import S3Options, place
from megatron_davinci.data.source import Source
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.train.run_directory import RunDirectory

DECLARED_SLACK = 0.05
"""How far a source's size may be from what the configuration declares: declarations are rounded."""

_TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last line


def open_sources(config: RunConfig) -> dict[str, Source]:
    """Open every training source, and check it against the model's vocabulary and the size that is declared.

    Raises:
        DataError: A source is missing, damaged, or of another size than the configuration says.
        EnvironmentProblem: A file cannot be read.
    """
    data = config.data
    s3 = S3Options(**dict(data.s3))
    sources = {
        name: Source.open(
            name, place(source.path, s3), data.sequence_length, vocab_size=config.model.vocab_size
        )
        for name, source in data.sources.items()
    }
    _check_declared_sizes(config, sources)
    return sources


def pool_sizes(config: RunConfig, sources: Mapping[str, Source]) -> dict[str, int]:
    """Tokens by source: those that are there, and what the configuration declares of the others."""
    declared = {name: source.tokens for name, source in config.data.sources.items() if source.tokens}
    return {**declared, **{name: source.num_tokens for name, source in sources.items()}}


def _check_declared_sizes(config: RunConfig, sources: Mapping[str, Source]) -> None:
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
        number: Of the journal's record, from 0 on; None where the configuration's plan is all there is.
    """

    record: MixRecord
    number: int | None


class Seat(NamedTuple):
    """Where in the run a sample is used.

    Attributes:
        plan: Its step.
        row: Its row in the global batch, from 0 on.
        data_rank: The data-parallel rank that takes it.
        micro_batch: Which of the rank's micro-batches of the step, from 0 on.
        micro_row: Its row in the micro-batch.
    """

    plan: StepPlan
    row: int
    data_rank: int
    micro_batch: int
    micro_row: int


@dataclass(frozen=True)
class Forecast:
    """A run as it will be, or was. Made by `Forecast.read`.

    Attributes:
        config: The run configuration.
        schedule: Its schedule.
        sources: Its sources, open.
        journal: The run directory's journal, without a record if there is none.
        records: The mixtures that govern the run: the journal's, then what the configuration plans after them.
        curriculum: The data order that they make.
        layout: The ranks.
        layout_from: Who says so: `--ranks`, `the last start` or `the smallest`.
        done: Samples that the steps on record consumed; None without a record.
    """

    config: RunConfig
    schedule: Schedule
    sources: dict[str, Source]
    journal: Journal
    records: tuple[Governing, ...]
    curriculum: Curriculum
    layout: Layout
    layout_from: str
    done: int | None

    @classmethod
    def read(cls, config: RunConfig, ranks: int | None = None) -> Forecast:
        """Read what decides a run's data order. A run at work in the run directory is not disturbed.

        Args:
            config: The run configuration.
            ranks: To lay the batches over; by default those of the run's last start, or the fewest.

        Raises:
            ConfigError: The layout does not divide.
            DataError: A source or the journal is damaged or missing, or the configuration contradicts the run.
            EnvironmentProblem: A file cannot be read.
        """
        config = _without_cache(config)
        directory = RunDirectory(config.run.directory)
        facts = _facts(directory.path / "manifest.json")
        layout, layout_from = _layout(config, ranks, facts)
        schedule = Schedule(config.curriculum, config.data.sequence_length)
        sources = open_sources(config)
        journal = Journal.open(directory.journal, sources)
        if journal.records:
            _check_facts(config, sources, facts, directory.path / "manifest.json")
        pools = pool_sizes(config, sources)
        records = governing_records(config, schedule, journal, directory.journal, pools)
        return cls(
            config=config,
            schedule=schedule,
            sources=sources,
            journal=journal,
            records=records,
            curriculum=Curriculum(
                {name: source.num_windows for name, source in sources.items()},
                config.run.seed,
                [governing.record for governing in records],
            ),
            layout=layout,
            layout_from=layout_from,
            done=_samples_done(directory.metrics),
        )

    @property
    def total_samples(self) -> int:
        """Samples in the run."""
        return self.schedule.total_samples

    def check(self, n: int, where: str) -> None:
        """Refuse a sample that the run does not have.

        Raises:
            ConfigError: It is negative, or past the end.
        """
        if not 0 <= n < self.total_samples:
            raise ConfigError(
                "The run has no such sample.",
                where=where,
                found=f"{n:,}",
                expected=f"0 to {self.total_samples - 1:,}: the run has {self.total_samples:,} samples "
                f"in {self.schedule.total_steps:,} steps",
            )

    def first_sample_of(self, step: int, where: str) -> int:
        """The first sample of a step.

        Raises:
            ConfigError: The run has no such step.
        """
        if not 1 <= step <= self.schedule.total_steps:
            raise ConfigError(
                "The run has no such step.",
                where=where,
                found=f"{step:,}",
                expected=f"1 to {self.schedule.total_steps:,}",
            )
        segments = self.schedule.segments
        segment = segments[bisect_right([s.first_step for s in segments], step - 1) - 1]
        return segment.first_sample + (step - 1 - segment.first_step) * segment.batch

    def seat(self, n: int) -> Seat:
        """Where in the run sample `n` is used; the inverse of what the ranks do when they take theirs."""
        segments = self.schedule.segments
        segment = segments[bisect_right([s.first_sample for s in segments], n) - 1]
        row = (n - segment.first_sample) % segment.batch
        size = self.config.train.micro_batch_size
        turn, micro_row = divmod(row, size)
        micro_batch, data_rank = divmod(turn, self.layout.data)
        return Seat(self.schedule.at(n - row), row, data_rank, micro_batch, micro_row)

    def governing(self, n: int) -> Governing:
        """The record that decides what sample `n` is."""
        return self.records[bisect_right(self.curriculum.first_samples, n) - 1]

    def skipped(self, n: int) -> tuple[int, SkipRecord] | None:
        """The number and the record of the skip that leaves sample `n` out, if one does."""
        for number, record in enumerate(self.journal.records):
            if isinstance(record, SkipRecord) and record.from_sample <= n < record.to_sample:
                return number, record
        return None

    def position(self, n: int) -> int:
        """Which of its source's samples `n` is, counted from 0 since the run's beginning."""
        return self.curriculum.consumed(n)[self.curriculum.locate(n).source]

    def is_done(self, n: int) -> bool | None:
        """Whether the steps on record took sample `n`; None without a record."""
        return None if self.done is None else n < self.done


def governing_records(
    config: RunConfig, schedule: Schedule, journal: Journal, path: Path, pools: Mapping[str, int]
) -> tuple[Governing, ...]:
    """The journal's mixtures, since it is the record, and after them what the configuration plans.

    Args:
        config: The run configuration.
        schedule: Its schedule.
        journal: The run's journal.
        path: Of the journal, for messages.
        pools: Tokens by source, of `pool_sizes`.

    Raises:
        ConfigError: A domain is divided by the sizes of its sources, and one is not known.
        DataError: The configuration says something else of what the journal has decided.
    """
    found = [
        Governing(record, number)
        for number, record in enumerate(journal.records)
        if isinstance(record, MixRecord)
    ]
    begun: dict[str, Governing] = {}
    for governing in found:
        begun.setdefault(governing.record.stage, governing)
    planned = [
        record
        for stage in range(len(config.curriculum))
        if (record := stage_record(config, schedule, stage, pools)) is not None
    ]
    after = found[-1].record.first_sample if found else -1
    for record in planned:
        there = begun.pop(record.stage, None)
        if there is None and record.first_sample <= after:
            raise _contradiction(
                path,
                f"nothing of stage {record.stage}, and records up to sample {after:,}",
                _described(record),
            )
        if there is not None and there.record != record:
            raise _contradiction(
                f"{path}, line {(there.number or 0) + 1}", _described(there.record), _described(record)
            )
    if begun:
        unknown = next(iter(begun.values()))
        raise _contradiction(
            f"{path}, line {(unknown.number or 0) + 1}",
            _described(unknown.record),
            "steps of the stages " + ", ".join(record.stage for record in planned),
        )
    return (*found, *(Governing(record, None) for record in planned if record.first_sample > after))


def _without_cache(config: RunConfig) -> RunConfig:
    """The configuration for someone who only asks: nothing of what is read is kept."""
    s3 = config.data.s3.model_copy(update={"cache_bytes": 0})
    return config.model_copy(update={"data": config.data.model_copy(update={"s3": s3})})


def _described(record: MixRecord) -> str:
    mixture = ", ".join(f"{source} {weight}" for source, weight in record.weights.items())
    transforms = f"; transforms {json.dumps(record.transforms)}" if record.transforms else ""
    return f"stage {record.stage} from sample {record.first_sample:,} on: {mixture}{transforms}"


def _contradiction(where: object, found: str, planned: str) -> DataError:
    return DataError(
        "The configuration contradicts the run's journal, which has decided this part of the data order.",
        where=where,
        found=found,
        expected=f"as configured, {planned}",
        do="take the configuration that the run was started with (config.yaml in its directory), or name "
        "another run.directory",
    )


def _layout(config: RunConfig, ranks: int | None, facts: dict[str, Any]) -> tuple[Layout, str]:
    if ranks is not None:
        return check_layout(config, ranks), "--ranks"
    last = facts.get("platform")
    recorded = last.get("ranks") if isinstance(last, dict) else None
    if isinstance(recorded, int):
        try:
            return check_layout(config, recorded), "the last start"
        except ConfigError:
            pass  # another layout was configured since
    return check_layout(config, config.parallel.model_ranks), "the smallest"


def _facts(path: Path) -> dict[str, Any]:
    """What is on record of the run; empty for a run that has not begun."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError("The run's manifest cannot be read.", where=path, found=error) from error
    if not isinstance(content, dict):
        raise DataError(
            "The run's manifest is not one.", where=path, found=type(content).__name__, expected="an object"
        )
    return content


def _check_facts(config: RunConfig, sources: dict[str, Source], facts: dict[str, Any], path: Path) -> None:
    now: dict[str, Any] = {"seed": config.run.seed, "sequence_length": config.data.sequence_length}
    differing = [
        f"{name}: {facts[name]} on record, {value} as configured"
        for name, value in now.items()
        if name in facts and facts[name] != value
    ]
    recorded = facts.get("data_fingerprints", {})
    prints = {name: source.fingerprint for name, source in sources.items()}
    if isinstance(recorded, dict) and recorded:
        differing += _differing_sources(recorded, prints)
    if differing:
        raise DataError(
            "The configuration contradicts the run: what decides the data order is not as it was.",
            where=path,
            found="\n".join(differing[:12]),
            do="take the configuration and the data of the run (config.yaml in its directory), or name "
            "another run.directory",
        )


def _differing_sources(recorded: dict[str, Any], now: dict[str, str]) -> Iterable[str]:
    for name in sorted({*recorded, *now}):
        if name not in now:
            yield f"source {name}: on record, not configured"
        elif name not in recorded:
            yield f"source {name}: configured, not on record"
        elif recorded[name] != now[name]:
            yield f"source {name}: other content than on record"


def _samples_done(metrics: Path) -> int | None:
    """Samples consumed by the last step on record. Its line may be half-written at this moment."""
    try:
        with open(metrics, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            consumed = json.loads(line)["consumed_samples"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(consumed, int):
            return consumed
    return None
