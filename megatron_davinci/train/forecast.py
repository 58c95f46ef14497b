"""The data order of a run, read from its configuration and its directory; nothing is started and nothing written.

Here is what the trainer and whoever only asks must agree on. It needs no torch, so that an answer takes no seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_davinci.config import Layout, RunConfig, check_layout
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal, SkipRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.train.outlook import look_ahead
from megatron_davinci.train.past import Past
from megatron_davinci.train.planned import Governing, governing_records, open_sources, pool_sizes
from megatron_davinci.train.run_directory import RunDirectory


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
        past = Past.read(directory)
        layout, layout_from = _layout(config, ranks, past.facts)
        schedule = Schedule(config.curriculum, config.data.sequence_length)
        sources = open_sources(config)
        journal = Journal.open(directory.journal, sources)
        pools = pool_sizes(config, sources)
        windows = {name: source.num_windows for name, source in sources.items()}
        past.check(config, schedule, sources, journal, pools)
        planned = look_ahead(past, config, schedule, windows, journal, pools).planned
        records = governing_records(journal, planned)
        return cls(
            config=config,
            schedule=schedule,
            sources=sources,
            journal=journal,
            records=records,
            curriculum=Curriculum(
                windows,
                config.run.seed,
                [governing.record for governing in records],
            ),
            layout=layout,
            layout_from=layout_from,
            done=past.done,
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


def _without_cache(config: RunConfig) -> RunConfig:
    """The configuration for someone who only asks: nothing of what is read is kept."""
    s3 = config.data.s3.model_copy(update={"cache_bytes": 0})
    return config.model_copy(update={"data": config.data.model_copy(update={"s3": s3})})


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
