"""From the clock to this rank's tokens: which samples are its own, read ahead of the steps and put on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.config.data import LoaderConfig
from megatron_davinci.data.batches import Batches
from megatron_davinci.data.dali import DevicePieces
from megatron_davinci.data.loader import Loader, NativeLoader
from megatron_davinci.data.token_digest import digest_parts, digest_text
from megatron_davinci.data.transforms import SampleTransforms
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.host_memory import HostToDevice
from megatron_davinci.train.dali_feed import open_dali, rows_of


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


class Samples(NamedTuple):
    """This rank's rows of a global batch.

    Attributes:
        tokens: [rows, sequence_length + 1] int64; None on ranks that need none.
        loss_mask: [rows, sequence_length] uint8, what each label weighs in the loss; None where all weigh 1.
        tokens_cut: How many tokens transforms moved past the end, in the whole global batch; None where no transform
            lengthens samples.
        source: [rows] int64, each row's source by its place in the curriculum; None on ranks that need no tokens.
        digest: Of the tokens of the whole global batch; None unless it is asked for.
    """

    tokens: Tensor | None
    loss_mask: Tensor | None
    tokens_cut: int | None = None
    source: Tensor | None = None
    digest: str | None = None


class Feed:
    """Reads this rank's samples, as many steps ahead as it is asked for.

    Args:
        batches: Reads samples by number.
        settings: How they are read.
        micro_batch_size: Sequences a micro-batch.
        platform: Where they are used.
        every_stage_reads: Whether pipeline stages between the first and the last need tokens too.
        transforms: What each stage of the curriculum does to its samples; None, or an entry that is, for nothing.
        digests: Whether to say of what tokens each global batch is made.

    Raises:
        EnvironmentProblem: Workers cannot be started.
    """

    def __init__(
        self,
        batches: Batches,
        settings: LoaderConfig,
        micro_batch_size: int,
        platform: Platform,
        *,
        every_stage_reads: bool = False,
        transforms: Sequence[SampleTransforms | None] | None = None,
        digests: bool = False,
    ) -> None:
        self._curriculum, self._transforms = batches.curriculum, transforms
        self._size, self._platform, self._digests = micro_batch_size, platform, digests
        self._rank = parallel_state.get_data_parallel_rank()
        self._ranks = parallel_state.get_data_parallel_world_size()
        self._device = HostToDevice(platform)
        # Between the first and the last pipeline stage nothing looks at tokens, unless it is for documents.
        at_an_end = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        reads = at_an_end or every_stage_reads
        self._loader: Loader | None = self._open(batches, settings) if reads else None

    def micro_batches(self, batch: int) -> int:
        """Micro-batches a rank computes for a global batch."""
        return batch // (self._size * self._ranks)

    def request(self, first_sample: int, batch: int) -> None:
        """Begin to read a global batch in the background."""
        if self._loader is not None:
            self._loader.request(self.numbers(first_sample, batch))

    def take(self, first_sample: int, batch: int, stage: int) -> Samples:
        """This rank's rows of a global batch, on the device. They hold until the next are taken.

        Every rank calls this.

        Args:
            first_sample: The global batch's first sample.
            batch: Sequences in the global batch.
            stage: Number of the curriculum's stage that it is in.

        Raises:
            DataError: As `Loader.take`.
            EnvironmentProblem: As `Loader.take`.
        """
        transforms = None if self._transforms is None else self._transforms[stage]
        if self._loader is None:
            return Samples(None, None, self._total(0) if transforms and transforms.lengthens else None)
        self._device.wait()
        numbers = self.numbers(first_sample, batch)
        read = self._loader.take(numbers)
        found: Any = read.tokens
        tokens = rows_of(found, self._platform) if isinstance(found, DevicePieces) else None
        mask, cut = read.loss_mask, None
        if transforms is not None:
            host = found if tokens is None else tokens.cpu().numpy()
            transformed = transforms.apply(self._curriculum, numbers, host, mask)
            mask = transformed.weights
            if transforms.lengthens:
                found, tokens = transformed.tokens, None
                cut = self._total(transformed.cut)
        digest = None
        if self._digests:
            digest = self._digest(numbers, found if tokens is None else tokens.cpu().numpy())
        if tokens is None:
            tokens = self._device.copy(found)
        source = self._device.copy(read.source)
        weights = None if mask is None else self._device.copy(mask)
        return Samples(tokens.long(), weights, cut, source.long(), digest)

    def _digest(self, numbers: np.ndarray, tokens: np.ndarray) -> str:
        """The digest of the global batch, from this rank's part and the others'."""
        # A sum modulo 2^64, of which int64 is one way to write the terms.
        mine = np.array(digest_parts(numbers, tokens), np.uint64).view(np.int64)
        total = torch.from_numpy(mine).to(self._platform.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        first, second = total.tolist()
        return digest_text(first, second)

    def discard(self) -> None:
        """Forget what was requested: who reads is done with it, or its answer is dropped."""
        if self._loader is not None:
            self._loader.discard()

    def _total(self, mine: int) -> int:
        """The sum over the ranks that have the other rows of the global batch."""
        total = torch.tensor(mine, dtype=torch.int64, device=self._platform.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return int(total)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loader is not None:
            self._device.wait()
            self._loader.close()

    def _open(self, batches: Batches, settings: LoaderConfig) -> Loader:
        if settings.kind == "dali":
            return open_dali(
                batches,
                settings,
                micro_batch_size=self._size,
                data_ranks=self._ranks,
                platform=self._platform,
            )
        return NativeLoader(
            batches,
            workers=settings.workers,
            read_threads=settings.read_threads,
            prefetch_steps=settings.prefetch_steps,
            on_slot=self._device.pin,
        )

    def numbers(self, first_sample: int, batch: int) -> np.ndarray:
        """This rank's sample numbers of a global batch, in the order of its micro-batches: [rows] int64."""
        return rank_samples(
            first_sample, batch, data_rank=self._rank, data_ranks=self._ranks, micro_batch_size=self._size
        )
