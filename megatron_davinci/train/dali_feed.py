"""The seam between DALI, which knows no torch, and the step, which knows no DALI."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_davinci.config.data import LoaderConfig
from megatron_davinci.data.batches import Batches
from megatron_davinci.data.dali import DaliLoader, DevicePieces
from megatron_davinci.platform.device import Platform


def open_dali(
    batches: Batches, settings: LoaderConfig, *, micro_batch_size: int, data_ranks: int, platform: Platform
) -> DaliLoader:
    """A loader by DALI that leaves tokens where the step wants them.

    Args:
        batches: Reads samples by number.
        settings: How they are read.
        micro_batch_size: Sequences a micro-batch.
        data_ranks: Data-parallel ranks.
        platform: Where they are used.

    Raises:
        EnvironmentProblem: DALI is not installed, or this process may not start others.
    """
    return DaliLoader(
        batches,
        micro_batch_size=micro_batch_size,
        data_ranks=data_ranks,
        workers=settings.workers,
        prefetch_steps=settings.prefetch_steps,
        device=platform.device.index if platform.name == "cuda" else None,
    )


def rows_of(pieces: DevicePieces, platform: Platform) -> Tensor:
    """Micro-batches one after the other: [rows, sequence_length + 1] int64 on the device.

    Torch's stream waits for DALI's here, as DLPack has it. The rows are a copy that is done when this returns, so
    that DALI may use its own memory again; the step before was waited for already, when its loss was read.
    """
    rows = torch.cat([torch.from_dlpack(piece).to(platform.device).long() for piece in pieces.pieces])
    platform.synchronize()
    return rows
