"""What a run's health leaves on record, and what follows from it for the next start."""

from __future__ import annotations

from collections.abc import Callable

from megatron_davinci.data.journal import Journal, SkipRecord
from megatron_davinci.train.checkpoint_files import Checkpoint


def turned_back(journal: Journal) -> Callable[[Checkpoint], str | None]:
    """What says why a run does not go on from a checkpoint, though it is whole.

    A `skip` record that is younger than a checkpoint and leaves out samples that the checkpoint was trained on means
    that the run has turned back before it. So whether the run died in doing so makes no difference.

    Args:
        journal: The run's; only that of rank 0 has all records.
    """
    skips = [(n, skip) for n, skip in enumerate(journal.records) if isinstance(skip, SkipRecord)]

    def why(checkpoint: Checkpoint) -> str | None:
        records = (checkpoint.manifest.get("journal") or {}).get("records", 0)
        for number, skip in skips:
            if number >= records and skip.from_sample < checkpoint.consumed_samples:
                return (
                    f"it has trained on samples from {skip.from_sample:,} on, which the journal has left out since "
                    f"({skip.reason})"
                )
        return None

    return why
