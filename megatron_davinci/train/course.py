"""The course of a run's mixture, past and planned, read from its directory: no source is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal, MixRecord
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.edits import Edit, Edits
from megatron_davinci.train.outlook import look_ahead
from megatron_davinci.train.past import Past
from megatron_davinci.train.planned import Governing, governing_records, open_sources, place_of, pool_sizes
from megatron_davinci.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Use:
    """What a source gives.

    Attributes:
        source: Its name.
        domain: Its domain.
        windows: How many it has.
        given: Windows that it has given.
        planned: Windows that it will have given at the run's end.
    """

    source: str
    domain: str
    windows: int
    given: int
    planned: int

    @property
    def left(self) -> int:
        """Windows that are left of the epoch that it is in."""
        return -self.given % self.windows if self.given else self.windows


@dataclass(frozen=True)
class Course:
    """A run's mixture. Made by `Course.read`.

    Attributes:
        past: What is over.
        config: Of the run's last start.
        schedule: Its schedule.
        windows: By source.
        pools: Tokens by source.
        journal: The run's.
        records: The journal's mixtures, then those that are planned.
        begins: The first sample that something new may govern; None at the run's end.
    """

    past: Past
    config: RunConfig
    schedule: Schedule
    windows: dict[str, int]
    pools: dict[str, int]
    journal: Journal
    records: tuple[Governing, ...]
    begins: int | None

    @classmethod
    def read(cls, run: Path) -> Course:
        """Read it. A run at work in the directory is not disturbed.

        Raises:
            ConfigError: There is no run.
            DataError: A file of the run is damaged.
            EnvironmentProblem: A file cannot be read.
        """
        directory = RunDirectory(run)
        if not (run / "config.yaml").is_file():
            raise ConfigError(
                "There is no run here.",
                where=run,
                found="no config.yaml",
                expected="a run directory: `davinci train` makes one when a run starts",
            )
        config = load_config(run / "config.yaml")
        past = Past.read(directory)
        windows, pools = past.facts.get("windows"), past.facts.get("pools")
        if (
            not isinstance(windows, dict)
            or not isinstance(pools, dict)
            or set(windows) != set(config.data.sources)
        ):
            sources = open_sources(config)
            windows = {name: source.num_windows for name, source in sources.items()}
            pools = pool_sizes(config, sources)
        schedule = Schedule(config.curriculum, config.data.sequence_length)
        journal = Journal.open(directory.journal, config.data.sources)
        return cls._of(past, config, schedule, windows, pools, journal)

    @classmethod
    def _of(
        cls, past: Past, config: RunConfig, schedule: Schedule, windows: Any, pools: Any, journal: Any
    ) -> Course:
        ahead = look_ahead(past, config, schedule, windows, journal, pools, strict=False)
        records = governing_records(journal, ahead.planned)
        return cls(past, config, schedule, windows, pools, journal, records, ahead.begins)

    def with_edits(self, edits: Edits) -> Course:
        """The course with other edits: what one would change."""
        past = replace(self.past, edits=edits)
        return self._of(past, self.config, self.schedule, self.windows, self.pools, self.journal)

    @property
    def total(self) -> int:
        """Samples in the run."""
        return self.schedule.total_samples

    @property
    def now(self) -> int:
        """Samples that steps on record consumed."""
        return min(self.past.consumed, self.total)

    def curriculum(self) -> Curriculum:
        """The data order to the run's end."""
        return Curriculum(self.windows, self.config.run.seed, [record for record, _ in self.records])

    def uses(self) -> list[Use]:
        """What each source gives, by domain and name."""
        curriculum = self.curriculum()
        given, planned = (curriculum.consumed(n) if n else {} for n in (self.now, self.total))
        data = self.config.data
        return [
            Use(name, data.domain(name), self.windows[name], given.get(name, 0), planned.get(name, 0))
            for name in sorted(self.windows, key=lambda name: (data.domain(name), name))
        ]

    def step_of(self, sample: int) -> int:
        """The number of the step that begins at a sample."""
        return self.schedule.at(sample).step

    def edit_states(self) -> list[tuple[Edit, str, int | None]]:
        """Every edit, what became of it, and from where on it holds.

        `in force`, `over`, `planned`, `withdrawn`, `replaced` (by a later one before it took effect, or one that is
        planned for the same step), or `without effect` (no step begins there).
        """
        places = {
            record.origin: (record.first_sample, number) for record, number in self.records if record.origin
        }
        last = self.journal.mixes[-1].origin if self.journal.mixes else ""
        pending = {edit.name for edit in self.past.edits.pending(self.journal.mixes)}
        found: list[tuple[Edit, str, int | None]] = []
        for edit in self.past.edits.asked:
            sample, number = places.get(edit.name, (None, None))
            if sample is not None and number is not None:
                found.append((edit, "in force" if edit.name == last else "over", sample))
            elif sample is not None:
                found.append((edit, "planned", sample))
            elif edit.name in self.past.edits.withdrawn:
                found.append((edit, "withdrawn", None))
            else:
                is_placed = self.begins is not None and place_of(edit, self.schedule, self.begins) is not None
                without = edit.name in pending and not is_placed
                found.append((edit, "without effect" if without else "replaced", None))
        return found


def as_json(course: Course) -> dict[str, Any]:
    """The course as plain values."""
    length = course.config.data.sequence_length

    def place(sample: int | None) -> dict[str, Any] | None:
        if sample is None or sample >= course.total:
            return None
        plan = course.schedule.at(sample)
        return {"sample": sample, "tokens": sample * length, "step": plan.step, "stage": plan.stage_name}

    return {
        "run": str(course.past.directory.path),
        "total": {
            "samples": course.total,
            "tokens": course.total * length,
            "steps": course.schedule.total_steps,
        },
        "now": {"samples": course.now, "tokens": course.now * length, "fraction": course.now / course.total},
        "change_begins": place(course.begins),
        "records": [
            {
                **(place(record.first_sample) or {}),
                "in_journal": number is not None,
                "origin": record.origin,
                "reason": record.reason,
                "weights": dict(record.weights),
            }
            for record, number in course.records
        ],
        "edits": [
            {
                "name": edit.name,
                "state": state,
                "asked": edit.asked,
                "from": place(sample),
                "weights": dict(edit.weights),
                "reason": edit.reason,
                "time": edit.time,
                "withdrawn": course.past.edits.withdrawn.get(edit.name),
            }
            for edit, state, sample in course.edit_states()
        ],
        "sources": [
            {
                "name": use.source,
                "domain": use.domain,
                "windows": use.windows,
                "given": use.given,
                "epochs": use.given / use.windows if use.windows else 0.0,
                "left_in_epoch": use.left,
                "planned": use.planned,
                "planned_epochs": use.planned / use.windows if use.windows else 0.0,
            }
            for use in course.uses()
        ],
    }


def spans(records: Sequence[Governing], total: int) -> list[tuple[int, int, MixRecord]]:
    """From where to where each record governs."""
    firsts = [record.first_sample for record, _ in records] + [total]
    return [
        (first, end, record) for (record, _), first, end in zip(records, firsts, firsts[1:], strict=False)
    ]
