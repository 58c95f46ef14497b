"""The run's data order, extended as the run goes on: its journal, its curriculum, and what is planned after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_davinci.config import RunConfig
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import CheckpointError
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.platform.distributed import broadcast_object
from megatron_davinci.train.forecast import governing_records, open_sources, pool_sizes, stage_record
from megatron_davinci.train.repetition import check_caps


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

    Every rank calls every method with the same arguments. Only rank 0 has the journal.

    Args:
        config: The run configuration.
        schedule: The run's schedule.
        sources: The open sources.
        path: The run's journal.

    Attributes:
        curriculum: The journal's mixtures, and of the planned ones those that were prepared.
    """

    def __init__(self, config: RunConfig, schedule: Schedule, sources: dict[str, Source], path: Path) -> None:
        self._config, self.schedule, self.sources = config, schedule, sources
        self._pools = pool_sizes(config, sources)
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self.journal = Journal.open(path, sources) if self._writes else Journal.in_memory()
        windows = {name: source.num_windows for name, source in sources.items()}
        planned: list[MixRecord] = []
        if self._writes:
            # Refuses a configuration that contradicts it.
            records = governing_records(config, schedule, self.journal, path, self._pools)
            planned = [record for record, number in records if number is None]
            order = Curriculum(windows, config.run.seed, [governing.record for governing in records])
            check_caps(config, schedule, order)
        mixes, skips = self.journal.mixes, self.journal.skips
        if dist.is_initialized():
            mixes, skips, planned = broadcast_object((mixes, skips, planned))
        for skip in skips:
            self.journal.append(skip)  # changes nothing where the journal was read
        # The journal is the record: what it has beyond the stages, a controller's mixtures, is replayed as it is.
        self.curriculum = Curriculum(windows, config.run.seed, mixes)
        self._last_decided = mixes[-1].first_sample if mixes else -1
        # Not in the journal yet, by rising first sample. The curriculum has the first `_prepared` of them.
        self._planned = planned
        self._prepared = 0
        self._proposed: MixRecord | None = None

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
        self.prepare(plan)
        end = plan.first_sample + plan.batch
        due = [record for record in self._planned if record.first_sample < end]
        if not due:
            return
        if self._writes:
            for record in due:
                self.journal.append(record)
        if dist.is_initialized():
            dist.barrier()
        self._last_decided = due[-1].first_sample
        del self._planned[: len(due)]
        self._prepared -= len(due)

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
        if first_sample <= self._last_decided or first_sample >= self.schedule.total_samples:
            return None
        stage = self.schedule.at(first_sample).stage
        like = stage_record(self._config, self.schedule, stage, self._pools)
        assert like is not None  # a step of the stage begins here
        record = replace(like, first_sample=first_sample, weights=dict(weights), origin=origin, reason=reason)
        self.curriculum.check_mixture(record)
        self._proposed = record
        return record

    def revise(self, plan: StepPlan, stop_reading: Callable[[], None]) -> bool:
        """Take up what was proposed since the last step.

        Args:
            plan: The next step, which nothing was taken of.
            stop_reading: Discards what was read ahead. Called before the curriculum changes.

        Returns:
            Whether the order changed from this step on, so that steps ahead must be prepared and asked for again.
        """
        record, self._proposed = self._proposed, None
        if record is None:
            return False
        stop_reading()
        self.curriculum.forget_from(max(record.first_sample, self._last_decided + 1))
        self._planned = sorted(
            [*(r for r in self._planned if r.first_sample != record.first_sample), record],
            key=lambda r: r.first_sample,
        )
        self._prepared = sum(r.first_sample < record.first_sample for r in self._planned[: self._prepared])
        return True

    def skips(self, plan: StepPlan) -> SkipRecord | None:
        """The skip that leaves out a sample of the step, if one does. Such a step is not taken, as a whole.

        The clock runs through it: no other step moves, changes its samples, or its learning rate.
        """
        end = plan.first_sample + plan.batch
        for skip in self.journal.skips:
            if skip.from_sample < end and plan.first_sample < skip.to_sample:
                return skip
        return None

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
