"""What all ranks agree on between two steps, in one collective: edits of the mixture, and whether to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_davinci.errors import Stopped
from megatron_davinci.platform.distributed import largest
from megatron_davinci.train.signals import WATCH, signal_name


@dataclass(frozen=True)
class Agreed:
    """The same on every rank.

    Attributes:
        edited: Whether rank 0 has seen somebody ask for another mixture.
        signal: The number of a signal that asks the run to end; 0 for none.
        rank: A rank that heard it.
    """

    edited: bool
    signal: int = 0
    rank: int = 0


def meet(edited: bool) -> Agreed:
    """Every rank calls this before each step, with what it knows itself."""
    if not dist.is_initialized():
        return Agreed(edited, WATCH.asked)
    # The signal stands above the rank, so that the rank is one that heard this signal.
    news, heard = largest([int(edited), WATCH.asked << 32 | dist.get_rank() if WATCH.asked else 0])
    return Agreed(news > 0, heard >> 32, heard & 0xFFFFFFFF)


def stopped(agreed: Agreed, step: int, consumed_samples: int, checkpoint: object) -> Stopped:
    """What a run says that has ended as it was asked to.

    Args:
        agreed: Who asked.
        step: The last step.
        consumed_samples: What the run has consumed.
        checkpoint: The folder of the step's checkpoint; None where no step was taken.
    """
    return Stopped(
        f"{signal_name(agreed.signal)} was heard by rank {agreed.rank}; "
        + (f"step {step:,} is saved." if checkpoint else "no step was taken."),
        where=checkpoint,
        do=f"start the same command again; the run goes on after step {step:,} ({consumed_samples:,} samples)",
    )
