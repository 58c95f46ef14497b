"""From a rank's samples to what the model gets: micro-batches on the device, with their masks and documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_davinci.model.context_parallel import SequencePart
from megatron_davinci.model.documents import DocumentMask, Documents


class MicroBatch(NamedTuple):
    """This rank's part of a micro-batch, on the device.

    Attributes:
        tokens: [batch, positions on this rank] int64; None on pipeline ranks that look at none.
        labels: The tokens that follow.
        loss_mask: What each label weighs, in whole numbers; None where all weigh 1.
        documents: What attention is confined to; None for whole sequences.
    """

    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    documents: Documents | None = None


def label_weight(
    tokens: Tensor, loss_mask: Tensor | None, document_mask: DocumentMask | None
) -> tuple[float, float]:
    """What the labels of a rank's samples weigh together, and how many they are; arguments as in `split`."""
    labels = tokens.shape[0] * (tokens.shape[1] - 1)
    if document_mask is None:
        return float(labels if loss_mask is None else loss_mask.sum()), float(labels)
    inside = ~document_mask.ends(tokens[:, :-1])
    weights = inside if loss_mask is None else torch.where(inside, loss_mask.to(inside.device), 0)
    return float(weights.sum()), float(labels)


def fill_up(
    tokens: Tensor | None, loss_mask: Tensor | None, rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """Append samples that carry no loss, for a schedule that needs more micro-batches than there are.

    Args:
        tokens: As in `split`.
        loss_mask: As in `split`.
        rows: Samples to append.
    """
    if tokens is None:
        return None, None
    if loss_mask is None:
        loss_mask = torch.ones(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.uint8, device=tokens.device)
    return (
        torch.cat([tokens, tokens[:1].expand(rows, -1)]),
        torch.cat([loss_mask, loss_mask.new_zeros(rows, loss_mask.shape[1])]),
    )


def split(
    tokens: Tensor | None,
    loss_mask: Tensor | None,
    document_mask: DocumentMask | None,
    size: int,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Make a rank's samples micro-batches. Documents are looked for when theirs is asked for.

    Args:
        tokens: [rows, sequence_length + 1] integers; they become int64 on the device and not before. None for no
            micro-batches at all, where nobody looks at them.
        loss_mask: [rows, sequence_length] integers, what each label weighs, 0 where it carries no loss; None where
            all weigh 1.
        document_mask: Confines attention to documents, and takes the loss from labels in another document than their
            input; None for plain causal attention.
        size: Rows of a micro-batch.
        device: Where the model computes.

    Raises:
        ValueError: There is a document mask and there are no tokens to see documents by. Attention would be plain
            causal on this pipeline rank, and nobody would notice.
    """
    if tokens is None:
        if document_mask is not None:
            raise ValueError("every pipeline rank needs the tokens to confine attention to documents")
        return
    part = SequencePart.here(tokens.shape[1] - 1)
    rows = tokens.to(device, non_blocking=True).long()
    if loss_mask is not None:
        loss_mask = loss_mask.to(device, non_blocking=True)
    ends_here = None
    if document_mask is not None:
        ends = document_mask.ends(rows[:, :-1])
        loss_mask = ~ends if loss_mask is None else torch.where(ends, 0, loss_mask)
        # Once a step, before anything is computed: nothing on the device is waited for but the tokens.
        ends_here = ends.cpu().numpy()
    for first in range(0, len(rows), size):
        these = slice(first, first + size)
        documents = None
        if document_mask is not None and ends_here is not None:
            documents = Documents.of(
                ends_here[these], part, device, reset_positions=document_mask.reset_positions
            )
        yield MicroBatch(
            part.take(rows[these, :-1]),
            part.take(rows[these, 1:]).contiguous(),
            None if loss_mask is None else part.take(loss_mask[these]),
            documents,
        )
