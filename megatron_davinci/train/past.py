"""What of a run is over, read from its directory, and whether a configuration leaves that as it was.

The past is what a checkpointed or logged step consumed, and what the journal has decided. What lies ahead may change:
stages to come, sources, and the tokens, batches, learning rates and mixture of the stage that the run is in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.source_weights import mixed_sources, source_weights
from megatron_davinci.config.transform_checks import recorded
from megatron_davinci.data.apportion import exact_weight
from megatron_davinci.data.journal import Journal, MixRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import ConfigError, DataError, DavinciError
from megatron_davinci.files import lines_from_the_end
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.edits import EditFile, Edits
from megatron_davinci.train.planned import stage_record, where_change_begins
from megatron_davinci.train.run_directory import RunDirectory

_MOST_PROBLEMS = 12


@dataclass(frozen=True)
class Past:
    """What a run directory says of a run that was at work in it. Made by `Past.read`.

    Attributes:
        directory: The run's.
        facts: Of `manifest.json`; empty for a run that has not begun.
        config: Of the last start; None where there is none that can be read.
        done: Samples that the steps on record consumed; None without a record.
        saved: Samples that the newest checkpoint's run had consumed; 0 without one.
        edits: Changes of the mixture that were asked for.
    """

    directory: RunDirectory
    facts: dict[str, Any]
    config: RunConfig | None
    done: int | None
    saved: int
    edits: Edits

    @classmethod
    def read(cls, directory: RunDirectory) -> Past:
        """Read it. A run at work in the directory is not disturbed.

        Raises:
            DataError: The manifest or the edits are damaged.
            EnvironmentProblem: A file cannot be read.
        """
        return cls(
            directory=directory,
            facts=_facts(directory.path / "manifest.json"),
            config=_recorded_config(directory.path / "config.yaml"),
            done=_samples_done(directory.metrics),
            saved=_samples_saved(directory.checkpoints),
            edits=EditFile(directory.edits).read(),
        )

    @property
    def consumed(self) -> int:
        """Samples that a checkpointed or logged step consumed."""
        return max(self.done or 0, self.saved)

    def stage_weights(self, stage: str, pools: Mapping[str, int]) -> dict[str, str] | None:
        """The mixture that the last start's configuration had for a stage; None where it had no such stage.

        Args:
            stage: Its name.
            pools: Tokens by source.
        """
        settings = _stage_of(self.config, stage)
        if self.config is None or settings is None:
            return None
        known = self.facts.get("pools")
        return source_weights(
            settings, self.config.data, {**(known if isinstance(known, dict) else {}), **pools}
        )

    def check(
        self,
        config: RunConfig,
        schedule: Schedule,
        sources: Mapping[str, Source],
        journal: Journal,
        pools: Mapping[str, int],
    ) -> None:
        """Refuse a configuration that would rewrite the past. Everything that differs is said.

        Args:
            config: The configuration.
            schedule: Its schedule.
            sources: Its sources, open.
            journal: The run's.
            pools: Tokens by source.

        Raises:
            DataError: It would.
        """
        if not journal.records and not self.consumed:
            return
        problems = [
            *self._facts_that_differ(config, sources, journal),
            *self._steps_that_differ(schedule),
            *self._stages_that_differ(config, pools),
            *self._records_that_differ(config, schedule, journal, pools),
        ]
        if not problems:
            return
        rest = len(problems) - _MOST_PROBLEMS
        raise DataError(
            "The configuration contradicts the run: its past is sealed, and only what lies ahead may change.",
            where=self.directory.path,
            found="\n".join(problems[:_MOST_PROBLEMS] + ([f"and {rest} more"] if rest > 0 else [])),
            expected=f"the past as it was; {self._present(schedule, journal)}",
            do="take what is named from config.yaml in the run directory; to go another way from an earlier "
            "checkpoint, `davinci train CONFIG --branch RUN@STEP` in another run.directory",
        )

    # ---- what differs -------------------------------------------------------------------------------------

    def _facts_that_differ(
        self, config: RunConfig, sources: Mapping[str, Source], journal: Journal
    ) -> Iterator[str]:
        now: dict[str, Any] = {"seed": config.run.seed, "sequence_length": config.data.sequence_length}
        for name, value in now.items():
            if name in self.facts and self.facts[name] != value:
                yield f"{name}: {self.facts[name]} on record, {value} as configured"
        prints = self.facts.get("data_fingerprints")
        for name in sealed_sources(journal):
            recorded_print = prints.get(name) if isinstance(prints, dict) else None
            if recorded_print is not None and recorded_print != sources[name].fingerprint:
                yield f"source {name}: other content than on record"

    def _steps_that_differ(self, schedule: Schedule) -> Iterator[str]:
        """Stages whose steps of the past are other ones: their batches, where they begin or end, their order."""
        if self.config is None:
            return
        was = Schedule(self.config.curriculum, self.config.data.sequence_length)
        before, after = _taken(was, self.consumed), _taken(schedule, self.consumed)
        if before == after:
            return
        names = list(dict.fromkeys([*(name for name, *_ in before), *(name for name, *_ in after)]))
        differing = [name for name in names if _steps_of(before, name) != _steps_of(after, name)]
        for name in differing or names[:1]:
            yield (
                f"stage {name}: {_steps_of(before, name) or 'no step'} on record, "
                f"{_steps_of(after, name) or 'no step'} as configured"
                + ("" if differing else ", in another order")
            )

    def _stages_that_differ(self, config: RunConfig, pools: Mapping[str, int]) -> Iterator[str]:
        """What else the configuration says of stages that are over; and transforms of the one that the run is in."""
        if self.config is None:
            return
        was = Schedule(self.config.curriculum, self.config.data.sequence_length)
        for number, before in enumerate(self.config.curriculum):
            segments, after = was.stage_segments(number), _stage_of(config, before.name)
            if not segments or segments[0].first_sample >= self.consumed:
                break
            if after is None:
                continue  # its steps differ, which is said already
            if segments[-1].end_sample <= self.consumed:
                kept, now = (stage.model_dump(mode="json", exclude={"mixture"}) for stage in (before, after))
                for key in kept:
                    if kept[key] != now.get(key):
                        yield (
                            f"stage {before.name} is over; its {key}: {kept[key]} on record, "
                            f"{now.get(key)} as configured"
                        )
                ours, theirs = (
                    self.stage_weights(before.name, pools),
                    source_weights(after, config.data, pools),
                )
                if ours != theirs:
                    yield (
                        f"stage {before.name} is over; its mixture: {shares(ours or {})} on record, "
                        f"{shares(theirs)} as configured"
                    )
            elif not _same_transforms(before, self.config, after, config):
                yield (
                    f"stage {before.name} has begun; its transforms cannot change: end it here and let a stage of "
                    "another name begin"
                )

    def _records_that_differ(
        self, config: RunConfig, schedule: Schedule, journal: Journal, pools: Mapping[str, int]
    ) -> Iterator[str]:
        """Records of the journal that the schedule, or the stages where nothing else is known, do not bear out."""
        seen: set[str] = set()
        names = [stage.name for stage in schedule.stages]
        for number, record in enumerate(journal.records, start=1):
            if not isinstance(record, MixRecord):
                continue
            first, where = record.stage not in seen, f"journal.jsonl, line {number}"
            seen.add(record.stage)
            own = (
                stage_record(config, schedule, names.index(record.stage), pools)
                if record.stage in names
                else None
            )
            if own is None:
                yield f"{where}: {described(record)}; no step of a stage {record.stage} as configured"
            elif first and own.first_sample != record.first_sample:
                yield (
                    f"{where}: {described(record)}; as configured, the stage begins at sample "
                    f"{own.first_sample:,}"
                )
            elif not first and not _begins_step(schedule, record):
                yield f"{where}: {described(record)}; as configured, no step of the stage begins there"
            elif self.config is None and first and not record.origin and own != record:
                yield f"{where}: {described(record)}; as configured, {described(own)}"
        last = journal.mixes[-1].first_sample if journal.mixes else -1
        for number in range(len(names)):
            record_of = stage_record(config, schedule, number, pools)
            if record_of is not None and record_of.stage not in seen and record_of.first_sample <= last:
                yield (
                    f"journal.jsonl has nothing of stage {record_of.stage}, and records up to sample {last:,}; "
                    f"as configured, {described(record_of)}"
                )

    def _present(self, schedule: Schedule, journal: Journal) -> str:
        """Where the present begins, in words: by the schedule of the past, which is the one that the run had."""
        if self.config is not None:
            schedule = Schedule(self.config.curriculum, self.config.data.sequence_length)
        begins = where_change_begins(schedule, journal.mixes, self.consumed)
        if begins is None:
            return "the run is at its end"
        plan = schedule.at(begins)
        tokens = begins * schedule.sequence_length
        return (
            f"the present begins at step {plan.step:,} of stage {plan.stage_name}: sample {begins:,}, "
            f"{tokens:,} tokens"
        )


def sealed_sources(journal: Journal) -> list[str]:
    """The sources that a journal gives weight, sorted: their content may not change any more."""
    return sorted(
        {name for mix in journal.mixes for name, weight in mix.weights.items() if exact_weight(weight) > 0}
    )


def described(record: MixRecord) -> str:
    """A record on a line."""
    transforms = f"; transforms {json.dumps(record.transforms)}" if record.transforms else ""
    return (
        f"stage {record.stage} from sample {record.first_sample:,} on: {shares(record.weights)}{transforms}"
    )


def shares(weights: Mapping[str, str]) -> str:
    """A mixture on a line."""
    return ", ".join(f"{source} {weight}" for source, weight in weights.items())


def _stage_of(config: RunConfig | None, name: str) -> Stage | None:
    stages = [] if config is None else config.curriculum
    return next((stage for stage in stages if stage.name == name), None)


def _taken(schedule: Schedule, end: int) -> list[tuple[str, int, int]]:
    """The stretches of steps before a sample: stage, batch, samples."""
    return [
        (
            schedule.stages[segment.stage].name,
            segment.batch,
            min(segment.end_sample, end) - segment.first_sample,
        )
        for segment in schedule.segments
        if segment.first_sample < end
    ]


def _steps_of(taken: list[tuple[str, int, int]], stage: str) -> str:
    return ", ".join(
        f"{samples / batch:g} steps of {batch}" for name, batch, samples in taken if name == stage
    )


def _begins_step(schedule: Schedule, record: MixRecord) -> bool:
    try:
        return schedule.at(record.first_sample).stage_name == record.stage
    except ValueError:
        return False


def _same_transforms(before: Stage, old: RunConfig, after: Stage, new: RunConfig) -> bool:
    """Whether samples of the sources that both mix are changed alike."""
    common = sorted({*mixed_sources(before, old.data)} & {*mixed_sources(after, new.data)})
    if not common:
        return before.transforms == after.transforms
    alike = {"mixture": dict.fromkeys(common, "1")}
    was, now = (
        recorded(stage.model_copy(update=alike), config.data)
        for stage, config in ((before, old), (after, new))
    )
    return was == now


def _recorded_config(path: Path) -> RunConfig | None:
    try:
        return load_config(path)
    except ConfigError:
        # Missing, or of a release whose keys were others: then the journal alone says what the past was.
        return None


def _facts(path: Path) -> dict[str, Any]:
    """What is on record of the run; empty for a run that has not begun."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            "The run's manifest cannot be read.",
            where=path,
            found=error,
            do="restore the file from a copy of the run directory",
        ) from error
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise DataError(
            "The run's manifest is not one.",
            where=path,
            found="no list of the run's starts in it",
            expected="an object with `starts`",
            do="restore the file from a copy of the run directory",
        )
    return content


def _samples_saved(checkpoints: Path) -> int:
    """What the newest checkpoint's run had consumed. Its bytes are verified when it is loaded, not here."""
    for folder in checkpoint_files.steps(checkpoints):
        try:
            return checkpoint_files.read(folder, verify=False).consumed_samples
        except (DavinciError, OSError):
            continue
    return 0


def _samples_done(metrics: Path) -> int | None:
    """Samples consumed by the last step on record. Its line may be half-written at this moment."""
    try:
        consumed = (_consumed(line) for line in lines_from_the_end(metrics))
        return next((samples for samples in consumed if samples is not None), None)
    except OSError:
        return None


def _consumed(line: bytes) -> int | None:
    try:
        consumed = json.loads(line)["consumed_samples"]
    except (ValueError, KeyError, TypeError):
        return None
    return consumed if isinstance(consumed, int) else None
