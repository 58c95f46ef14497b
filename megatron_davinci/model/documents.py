"""The documents of a micro-batch: where they lie in its sequences, and how attention is confined to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_davinci.model.context_parallel import SequencePart
from megatron_davinci.model.pieces import Pieces, cut


@dataclass(frozen=True)
class DocumentMask:
    """How a micro-batch is divided into documents.

    Attributes:
        eod_id: The token that ends a document.
        reset_positions: Whether positions begin at 0 in every document.
    """

    eod_id: int
    reset_positions: bool = False

    def ends(self, inputs: Tensor) -> Tensor:
        """Where documents end: a bool for each of the input tokens."""
        return inputs == self.eod_id


@dataclass
class Documents(PackedSeqParams):
    """The documents of a micro-batch, on the way through Megatron-Core's layers to attention.

    Megatron-Core hands its `packed_seq_params` through all layers, recomputed or not, and acts on those of the format
    `thd` only. In another one tokens stay [sequence, batch, ...], with any number of sequences in a micro-batch.

    Use `Documents.of`.

    Attributes:
        starts: [batch, length] int64, where the document of each position begins, in the whole sequence.
        part: The part of each sequence that is on this rank.
        positions: [batch, positions on this rank] int64, counted from the document's beginning; None where they are
            not reset.
    """

    starts: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    part: SequencePart = field(default_factory=lambda: SequencePart(0))
    positions: Tensor | None = None
    _pieces: dict[bool, Pieces] = field(default_factory=dict)

    @classmethod
    def of(
        cls, ends: np.ndarray, part: SequencePart, device: torch.device, *, reset_positions: bool = False
    ) -> Documents | None:
        """Find the documents of a micro-batch.

        Args:
            ends: [batch, length] bool, whether the input token there is the last of its document.
            part: The part of each sequence that is on this rank.
            device: Where the model computes.
            reset_positions: Whether positions begin at 0 in every document.

        Returns:
            The documents; None if every sequence is one, which is plain causal attention.
        """
        if not ends[:, :-1].any():
            return None
        starts = document_starts(ends)
        positions = None
        if reset_positions:
            whole = torch.from_numpy(np.arange(part.length) - starts)
            positions = part.take(whole).to(device, non_blocking=True)
        return cls(
            qkv_format="sbhd",
            # What rotary embeddings are made for.
            max_seqlen_q=part.length,
            max_seqlen_kv=part.length,
            starts=starts,
            part=part,
            positions=positions,
        )

    def pieces(self, device: torch.device, *, by_size: bool) -> Pieces:
        """What attention computes on this rank; cut once for all layers."""
        if by_size not in self._pieces:
            self._pieces[by_size] = cut(self.starts, self.part, device, by_size=by_size)
        return self._pieces[by_size]


def document_starts(ends: np.ndarray) -> np.ndarray:
    """Where the document of each position begins.

    Args:
        ends: [batch, length] bool, whether the token there is the last of its document.

    Returns:
        [batch, length] int64.
    """
    positions = np.arange(ends.shape[1])
    begins = np.zeros(ends.shape, np.int64)
    begins[:, 1:] = np.where(ends[:, :-1], positions[1:], 0)
    return np.maximum.accumulate(begins, axis=1)
