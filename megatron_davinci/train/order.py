"""The run's data order, extended stage by stage as the run goes on: its journal and its curriculum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_davinci.config import RunConfig
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal, SkipRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import CheckpointError
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.platform.distributed import broadcast_object
from megatron_davinci.train.forecast import governing_records, open_sources, stage_record


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
    """Extends the journal stage by stage, and answers where samples lie.

    Args:
        config: The run configuration.
        schedule: The run's schedule.
        sources: The open sources.
        path: The run's journal.
    """

    def __init__(self, config: RunConfig, schedule: Schedule, sources: dict[str, Source], path: Path) -> None:
        self._config, self.schedule, self.sources = config, schedule, sources
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self.journal = Journal.open(path, sources) if self._writes else Journal.in_memory()
        if self._writes:
            # Refuses a configuration that contradicts it.
            governing_records(config, schedule, self.journal, path)
        mixes, skips = self.journal.mixes, self.journal.skips
        if dist.is_initialized():
            mixes, skips = broadcast_object((mixes, skips))
        for skip in skips:
            self.journal.append(skip)  # changes nothing where the journal was read
        windows = {name: source.num_windows for name, source in sources.items()}
        # The journal is the record: what it has beyond the stages, a controller's mixtures, is replayed as it is.
        self.curriculum = Curriculum(windows, config.run.seed, mixes)
        self._begun = {record.stage for record in mixes}

    def prepare(self, plan: StepPlan) -> None:
        """Have the journal reach the stage of `plan`, on disk, before any of its samples is read."""
        for stage in range(plan.stage + 1):
            record = stage_record(self._config, self.schedule, stage)
            if record is None or record.stage in self._begun:
                continue
            if self._writes:
                self.journal.append(record)
            if dist.is_initialized():
                dist.barrier()
            self.curriculum.append(record)
            self._begun.add(record.stage)

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
