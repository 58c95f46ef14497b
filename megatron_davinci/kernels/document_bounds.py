"""Where documents of packed sequences begin, and each token's place in its own: from the token that ends one.

On a GPU without asking it anything: what it finds stays there, in tensors whose shapes do not depend on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_davinci.kernels.operators import operator
from megatron_davinci.kernels.ways import way_of

_OP = "document_bounds"


class DocumentBounds(NamedTuple):
    """The documents of a batch of sequences; each sequence begins one.

    Attributes:
        positions: [batch, length] int64, places of tokens in their documents.
        bounds: [batch * length + 1] int32, `cu_seqlens` of the batch's sequences one behind the other: where
            documents begin, and behind them, as often as there is room, where the last ends.
        number: [] int64, how many documents there are.
    """

    positions: Tensor
    bounds: Tensor
    number: Tensor


def document_bounds(tokens: Tensor, eod_id: int) -> DocumentBounds:
    """Find the documents of a batch.

    Args:
        tokens: [batch, length] int64.
        eod_id: The token that ends a document.

    Raises:
        ValueError: Tokens are of another shape or dtype, or 2^31 and more.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() >= 2**31:
        raise ValueError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}: fewer than 2^31 of torch.int64, [batch, length], are "
            "expected"
        )
    positions, bounds, number = found(tokens.contiguous(), eod_id)
    return DocumentBounds(positions, bounds, number)


@operator(
    "davinci::document_bounds",
    mutates_args=(),
    schema="(Tensor tokens, int eod_id) -> (Tensor, Tensor, Tensor)",
)
def found(tokens: Tensor, eod_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `document_bounds`.

    Args:
        tokens: [batch, length] int64.
        eod_id: The token that ends a document.
    """
    batch, length = tokens.shape
    positions, count = torch.empty_like(tokens), tokens.new_zeros(())
    bounds = torch.zeros(tokens.numel() + 1, dtype=torch.int32, device=tokens.device)
    if not tokens.numel():
        return positions, bounds, count
    way = way_of(_OP, tokens)
    if way.has_kernels:
        counts = tokens.new_empty(batch)
        way.launch("document_positions", batch, tokens, tokens, positions, counts, eod_id, batch, length)
        way.launch("document_bounds", batch, tokens, positions, counts, bounds, count, batch, length)
        return positions, bounds, count
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eod_id
    places = torch.arange(length, device=tokens.device)
    positions = places - torch.where(begins, places, 0).cummax(1).values
    firsts = begins.flatten().nonzero().flatten().int()
    bounds[: len(firsts)], bounds[len(firsts) :] = firsts, tokens.numel()
    return positions, bounds, count + len(firsts)


@found.register_fake
def _(tokens: Tensor, eod_id: int) -> tuple[Tensor, Tensor, Tensor]:
    bounds = torch.empty(tokens.numel() + 1, dtype=torch.int32, device=tokens.device)
    return torch.empty_like(tokens), bounds, tokens.new_empty(())
