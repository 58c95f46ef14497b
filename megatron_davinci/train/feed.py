"""From the clock to this rank's tokens: which samples are its own, read ahead of the step."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.data.batches import Batches, Prefetcher


def rank_samples(
    first_sample: int, batch: int, *, data_rank: int, data_ranks: int, micro_batch_size: int
) -> np.ndarray:
    """The sample numbers of one rank in one global batch, micro-batch by micro-batch.

    Micro-batch `m` of data-parallel rank `r` takes the samples from `first + (m * ranks + r) * size` on, so the
    global batch is the same set for every layout.

    Args:
        first_sample: The global batch's first sample.
        batch: Sequences in the global batch; a multiple of `data_ranks * micro_batch_size`.
        data_rank: This data-parallel rank.
        data_ranks: Data-parallel ranks.
        micro_batch_size: Sequences a micro-batch.

    Returns:
        [batch / data_ranks] int64.
    """
    numbers = np.arange(first_sample, first_sample + batch, dtype=np.int64)
    return numbers.reshape(-1, data_ranks, micro_batch_size)[:, data_rank].reshape(-1)


class Feed:
    """Reads this rank's samples, one step ahead.

    Args:
        batches: Reads samples by number.
        micro_batch_size: Sequences a micro-batch.
    """

    def __init__(self, batches: Batches, micro_batch_size: int) -> None:
        self._prefetcher = Prefetcher(batches)
        self._size = micro_batch_size
        self._rank = parallel_state.get_data_parallel_rank()
        self._ranks = parallel_state.get_data_parallel_world_size()
        # Between the first and the last pipeline stage nothing looks at tokens.
        self._reads = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()

    def micro_batches(self, batch: int) -> int:
        """Micro-batches a rank computes for a global batch."""
        return batch // (self._size * self._ranks)

    def request(self, first_sample: int, batch: int) -> None:
        """Begin to read a global batch in the background."""
        if self._reads:
            self._prefetcher.request(self._mine(first_sample, batch))

    def take(self, first_sample: int, batch: int) -> Tensor | None:
        """This rank's rows of a global batch, [rows, sequence_length + 1] int64; None where none are needed."""
        if not self._reads:
            return None
        return torch.from_numpy(self._prefetcher.take(self._mine(first_sample, batch)).tokens).long()

    def close(self) -> None:
        """Stop reading ahead."""
        self._prefetcher.close()

    def _mine(self, first_sample: int, batch: int) -> np.ndarray:
        return rank_samples(
            first_sample, batch, data_rank=self._rank, data_ranks=self._ranks, micro_batch_size=self._size
        )
