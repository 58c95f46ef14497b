"""From the clock to this rank's tokens: which samples are its own, read ahead of the steps and put on the device."""

from __future__ import annotations

import numpy as np
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.config.data import LoaderConfig
from megatron_davinci.data.batches import Batches
from megatron_davinci.data.loader import Loader, NativeLoader
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.host_memory import HostToDevice


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
    """Reads this rank's samples, as many steps ahead as it is asked for.

    Args:
        batches: Reads samples by number.
        settings: How they are read.
        micro_batch_size: Sequences a micro-batch.
        platform: Where they are used.

    Raises:
        EnvironmentProblem: Workers cannot be started.
    """

    def __init__(
        self, batches: Batches, settings: LoaderConfig, micro_batch_size: int, platform: Platform
    ) -> None:
        self._size = micro_batch_size
        self._rank = parallel_state.get_data_parallel_rank()
        self._ranks = parallel_state.get_data_parallel_world_size()
        self._device = HostToDevice(platform)
        # Between the first and the last pipeline stage nothing looks at tokens.
        reads = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        self._loader: Loader | None = self._open(batches, settings) if reads else None

    def micro_batches(self, batch: int) -> int:
        """Micro-batches a rank computes for a global batch."""
        return batch // (self._size * self._ranks)

    def request(self, first_sample: int, batch: int) -> None:
        """Begin to read a global batch in the background."""
        if self._loader is not None:
            self._loader.request(self._mine(first_sample, batch))

    def take(self, first_sample: int, batch: int) -> Tensor | None:
        """This rank's rows of a global batch; None where none are needed.

        Returns:
            [rows, sequence_length + 1] int64 on the device. It holds until the next is taken.
        """
        if self._loader is None:
            return None
        self._device.wait()
        return self._device.copy(self._loader.take(self._mine(first_sample, batch)).tokens)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loader is not None:
            self._device.wait()
            self._loader.close()

    def _open(self, batches: Batches, settings: LoaderConfig) -> Loader:
        return NativeLoader(
            batches,
            workers=settings.workers,
            read_threads=settings.read_threads,
            prefetch_steps=settings.prefetch_steps,
            on_slot=self._device.pin,
        )

    def _mine(self, first_sample: int, batch: int) -> np.ndarray:
        return rank_samples(
            first_sample, batch, data_rank=self._rank, data_ranks=self._ranks, micro_batch_size=self._size
        )
