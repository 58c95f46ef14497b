"""Context parallelism: which positions of a sequence a rank holds, and keys and values gathered from all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class SequencePart:
    """What one rank of a context-parallel group holds of every sequence.

    The sequence is cut into `2 * ranks` chunks, and rank `r` holds chunk `r` and chunk `2 * ranks - 1 - r`. Under
    causal attention a late chunk costs more than an early one; paired like this, all ranks have the same work. It is
    how Megatron-Core cuts its rotary embeddings.

    Attributes:
        length: Positions in the whole sequence; a multiple of `2 * ranks` if there is more than one rank.
        ranks: Ranks in the group.
        rank: This rank's number in it.
    """

    length: int
    ranks: int = 1
    rank: int = 0

    @classmethod
    def here(cls, length: int) -> SequencePart:
        """The part that this process holds, after the process groups are up."""
        return cls(
            length,
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Beginning and end of each chunk that the rank holds, in the order in which it holds them."""
        return self._chunks_of(self.rank)

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor whose dimension `dim` is the whole sequence."""
        if self.ranks == 1:
            return whole
        parts = [whole.narrow(dim, begin, end - begin) for begin, end in self.chunks]
        return torch.cat(parts, dim)

    def gathered_places(self) -> np.ndarray:
        """Where each position lies once the ranks' parts are laid one behind the other: [length] int64."""
        order = np.concatenate(
            [np.arange(begin, end) for rank in range(self.ranks) for begin, end in self._chunks_of(rank)]
        )
        places = np.empty(self.length, np.int64)
        places[order] = np.arange(self.length)
        return places

    def _chunks_of(self, rank: int) -> list[tuple[int, int]]:
        if self.ranks == 1:
            return [(0, self.length)]
        size = self.length // (2 * self.ranks)
        return [(n * size, (n + 1) * size) for n in (rank, 2 * self.ranks - 1 - rank)]


def gather_sequence(part: Tensor, group: Any) -> Tensor:
    """Lay the ranks' parts one behind the other; the gradient is summed over ranks and each gets that of its part.

    Args:
        part: [positions on this rank, ...].
        group: The context-parallel group.

    Returns:
        [positions on all ranks, ...], in the order of the ranks.
    """
    return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
