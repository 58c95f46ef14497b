"""The run's data order, extended as the run goes on: its journal, its curriculum, and what is planned after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_davinci.config import RunConfig
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import CheckpointError, DavinciError
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.platform.distributed import on_rank_zero
from megatron_davinci.train.documents import mask_problem
from megatron_davinci.train.edits import Edit, EditFile
from megatron_davinci.train.outlook import Outlook, edit_problem, exact, look_ahead, transforms_of
from megatron_davinci.train.past import Past, shares
from megatron_davinci.train.planned import mixture_at, open_sources, place_of, planned_records, pool_sizes
from megatron_davinci.train.repetition import check_caps
from megatron_davinci.train.run_directory import RunDirectory


def verified_sources(config: RunConfig) -> dict[str, Source]:
    """Open every training source; with `data.verify_digests`, compare every shard with its digest."""
    sources = open_sources(config)
    if config.data.verify_digests:
        # Each rank reads a part of the shards; one that finds a wrong one ends the run for all.
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for opened in sources.values():
            opened.verify(rank, ranks)
    return sources


class DataOrder:
    """What the journal has decided, then what is planned; planned records reach the journal before they are used.

    Every rank calls every method with the same arguments. Only rank 0 has the journal and reads what was asked for.

    Args:
        config: The run configuration.
        schedule: The run's schedule.
        sources: The open sources.
        directory: The run's.

    Attributes:
        curriculum: The journal's mixtures, and of the planned ones those that were prepared.

    Raises:
        ConfigError: An edit does not fit the configuration.
        DataError: The configuration would rewrite the run's past, or a file of it is damaged.
    """

    def __init__(
        self, config: RunConfig, schedule: Schedule, sources: dict[str, Source], directory: RunDirectory
    ) -> None:
        self._config, self.schedule, self.sources = config, schedule, sources
        self._windows = {name: source.num_windows for name, source in sources.items()}
        self._pools = pool_sizes(config, sources)
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self.journal = Journal.in_memory()
        self._file = EditFile(directory.edits)
        self._stamp = self._file.stamp()
        mixes, skips, ahead = on_rank_zero(lambda: self._read(directory))
        for skip in skips:
            self.journal.append(skip)  # changes nothing where the journal was read
        # The journal is the record: what it has beyond the stages, a controller's mixtures, is replayed as it is.
        self.curriculum = Curriculum(self._windows, config.run.seed, mixes)
        self._mixes, self._ahead = list(mixes), ahead
        # Not in the journal yet, by rising first sample. The curriculum has the first `_prepared` of them.
        self._planned = ahead.planned
        self._prepared = 0
        self._proposed: MixRecord | None = None
        self._messages: list[str] = []

    def _read(self, directory: RunDirectory) -> tuple[tuple[MixRecord, ...], tuple[SkipRecord, ...], Outlook]:
        """What the journal has, and what lies ahead of it; on rank 0."""
        config, schedule = self._config, self.schedule
        self.journal = Journal.open(directory.journal, self.sources)
        past = Past.read(directory)
        past.check(config, schedule, self.sources, self.journal, self._pools)
        ahead = look_ahead(past, config, schedule, self._windows, self.journal, self._pools)
        order = Curriculum(self._windows, config.run.seed, [*self.journal.mixes, *ahead.planned])
        check_caps(config, schedule, order)
        return self.journal.mixes, self.journal.skips, ahead

    @property
    def records(self) -> list[MixRecord]:
        """The journal's mixtures, and what is planned after them."""
        return [*self._mixes, *self._planned]

    def seal(self) -> None:
        """Decide now what takes effect where the present begins.

        A run that goes on from a checkpoint takes steps again that were on record. What a changed configuration or an
        edit changes begins after those; once they are taken again, nothing else would say so.
        """
        for name, why in self._ahead.overruled.items():
            self._messages.append(f"{name} is withdrawn: {why}.")
            if self._writes:
                self._file.withdraw(name, why)
        due = [record for record in self._planned if record.first_sample <= (self._ahead.begins or 0)]
        if any(record.origin for record in due):
            self._decide(due)

    def prepare(self, plan: StepPlan) -> None:
        """Have the curriculum reach the end of a step, before its samples are asked for. Nothing is decided by it."""
        end = plan.first_sample + plan.batch
        for record in self._planned[self._prepared :]:
            if record.first_sample >= end:
                break
            self.curriculum.append(record)
            self._prepared += 1

    def commit(self, plan: StepPlan) -> None:
        """Have the journal reach the end of a step, on disk, before any of its samples is used."""
        end = plan.first_sample + plan.batch
        due = [record for record in self._planned if record.first_sample < end]
        if due:
            self._decide(due)

    def _decide(self, due: list[MixRecord]) -> None:
        """Move the first of the planned records to the journal."""
        for record in self._planned[self._prepared : len(due)]:
            self.curriculum.append(record)

        def write() -> None:
            for record in due:
                self.journal.append(record)

        on_rank_zero(write)
        del self._planned[: len(due)]
        self._prepared = max(0, self._prepared - len(due))
        self._mixes += due
        self._messages += [self._told(record) for record in due if record.origin]

    def propose(
        self, first_sample: int, weights: Mapping[str, str], *, origin: str, reason: str = ""
    ) -> MixRecord | None:
        """Have a mixture govern from a sample on that no step has taken, until the next stage begins.

        It takes effect with `revise`, before the next step, and is in the journal before its first sample is used.

        Args:
            first_sample: Where the next step begins: what the run has consumed.
            weights: Share of samples by source, as text; they sum to 1.
            origin: Who decided it.
            reason: Why, for the reader.

        Returns:
            The record; None where the journal has decided already, as a resumed run replays, or where the run ends.

        Raises:
            DataError: The weights do not sum to 1, or one is of an unknown source or one without windows.
        """
        decided = self._mixes[-1].first_sample if self._mixes else -1
        if first_sample <= decided or first_sample >= self.schedule.total_samples:
            return None
        own = mixture_at(self._config, self.schedule, self._pools, first_sample)
        transforms = transforms_of(self._config, own.stage, weights)
        record = replace(own, weights=dict(weights), transforms=transforms, origin=origin, reason=reason)
        self.curriculum.check_mixture(record)
        self._proposed = record
        return record

    def mixture_at(self, sample: int) -> MixRecord:
        """The mixture that governs a sample, by the journal and what is planned."""
        return [record for record in self.records if record.first_sample <= sample][-1]

    def revise(self, plan: StepPlan, stop_reading: Callable[[], None], *, edited: bool) -> bool:
        """Take up what was proposed, and what was asked for in the run directory, since the last step.

        Args:
            plan: The next step, which nothing was taken of.
            stop_reading: Discards what was read ahead. Called before the curriculum changes.
            edited: Whether somebody asked for something, as all ranks have heard of rank 0.

        Returns:
            Whether the order changed from this step on, so that steps ahead must be prepared and asked for again.
        """
        planned = self._planned
        if edited:
            planned = on_rank_zero(lambda: self._replanned(plan))
        record, self._proposed = self._proposed, None
        if record is not None and not any(_is_edit(one, record.first_sample) for one in planned):
            others = (one for one in planned if one.first_sample != record.first_sample)
            planned = sorted([*others, record], key=lambda one: one.first_sample)
        if planned == self._planned:
            return False
        stop_reading()
        # Before the first step nothing is decided, and all that was prepared is only planned.
        self.curriculum.forget_from(self._mixes[-1].first_sample + 1 if self._mixes else 0)
        self._planned, self._prepared = planned, 0
        return True

    def edited(self) -> bool:
        """Whether somebody asked for something since the last time. Only rank 0 looks, and has to tell the others."""
        stamp = self._file.stamp() if self._writes else self._stamp
        is_news, self._stamp = stamp != self._stamp, stamp
        return is_news

    def _replanned(self, plan: StepPlan) -> list[MixRecord]:
        """What is planned from a step on, with the edits of now; as it was where they cannot be read."""
        try:
            edits = self._file.read()
        except DavinciError as error:
            self._messages.append(str(error))
            return self._planned
        fit = []
        for edit in edits.pending(self._mixes):
            problem = edit_problem(edit, self._config, self._windows) or self._mask_problem(edit, plan)
            if problem is None:
                fit.append(edit)
            else:
                self._messages.append(f"{edit.name} is left out: {problem}.")
        return planned_records(
            self._config,
            self.schedule,
            self._pools,
            self._mixes,
            fit,
            consumed=plan.first_sample,
        )

    def _mask_problem(self, edit: Edit, plan: StepPlan) -> str | None:
        sample = place_of(edit, self.schedule, plan.first_sample)
        if sample is None:
            return None
        stage = self._config.curriculum[self.schedule.at(sample).stage]
        return mask_problem(stage, self._config.data, exact(edit.weights), self.sources)

    def messages(self) -> list[str]:
        """What there is to say of changes since the last time."""
        said, self._messages = self._messages, []
        return said

    def _told(self, record: MixRecord) -> str:
        step = self.schedule.at(record.first_sample).step
        return f"The mixture changes from step {step:,} on ({record.origin}): {shares(record.weights)}" + (
            f". Reason: {record.reason}" if record.reason else ""
        )

    def pass_over(self, first_sample: int, end_sample: int, reason: str) -> None:
        """Have the journal leave samples out, on disk when this returns, but for those that it does already.

        Every rank calls this. What was read ahead holds where the samples belong to steps that are over.

        Args:
            first_sample: The first of them.
            end_sample: The first that is used again.
            reason: Why, for the reader.
        """
        while first_sample < end_sample:
            first_sample = self.journal.after_skips(first_sample)
            begins = [skip.from_sample for skip in self.journal.skips if skip.from_sample > first_sample]
            end = min([end_sample, *begins])
            if first_sample < end:
                skip = SkipRecord(first_sample, end, reason)
                on_rank_zero(partial(self.journal.append, skip))
                self.journal.append(skip)  # changes nothing where it was written
            first_sample = end

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of the journal."""
        return {"records": len(self.journal.records), "digest": self.journal.digest()}

    def check_extends(self, position: dict[str, Any] | None, folder: Path) -> None:
        """Refuse a checkpoint whose journal this run's does not extend."""
        if not self._writes:
            return
        position = position or {}
        if not self.journal.extends(position.get("records", -1), position.get("digest", "")):
            raise CheckpointError(
                "The run's journal is not the one that the checkpoint was saved with.",
                where=folder,
                found=f"journal.jsonl has another beginning than the {position.get('records', 'unknown')} records on "
                "which the checkpoint rests",
                do="restore journal.jsonl, or start another run in another run.directory",
            )


def _is_edit(record: MixRecord, sample: int) -> bool:
    return record.first_sample == sample and record.origin.startswith("edit-")
