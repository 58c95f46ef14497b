"""Rows for tokens that a vocabulary is extended by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Initial = Literal["mean", "normal", "subwords", "zeros"]


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a vocabulary is extended by.

    Attributes:
        first: The id of the first; no token of the old vocabulary has it, or one behind it.
        count: How many.
        how: What their rows begin with; see `extended`.
        seed: Of what is drawn.
        pieces: For `subwords`: the old ids of each.
    """

    first: int = 0
    count: int = 0
    how: Initial = "mean"
    seed: int = 0
    pieces: Sequence[Sequence[int]] | None = None


def extended(rows: Tensor, new: NewTokens) -> Tensor:
    """Give new tokens their rows, behind those of a vocabulary or in place of spare ones.

    `mean` is the mean of the old tokens' rows: a new one then takes no larger a share of the softmax than an old one
    does on average (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"). `normal` draws
    about it, with each channel's deviation. `subwords` takes the mean of the tokens that the old tokenizer writes the
    new one with.

    Args:
        rows: [vocabulary, hidden].
        new: The new tokens.

    Returns:
        [at least first + count, hidden], all other rows unchanged to the bit.
    """
    fresh = torch.zeros(new.count, rows.shape[1], dtype=torch.float32)
    old = rows[: new.first]
    if new.how == "subwords":
        assert new.pieces is not None
        for row, ids in zip(fresh, new.pieces, strict=True):
            row.copy_(old[list(ids)].float().mean(0))
    elif new.how != "zeros":
        mean = _mean(old)
        fresh += mean
        if new.how == "normal":
            generator = torch.Generator().manual_seed(new.seed)
            fresh += torch.randn(fresh.shape, generator=generator) * _deviation(old, mean)
    out = rows.new_empty(max(len(rows), new.first + new.count), rows.shape[1])
    out[: len(rows)] = rows
    out[new.first : new.first + new.count] = fresh.to(rows.dtype)
    return out


def _mean(rows: Tensor) -> Tensor:
    # Block by block: in fp64 the whole would be several times as large.
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(4096):
        total += block.double().sum(0)
    return (total / len(rows)).float()


def _deviation(rows: Tensor, mean: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(4096):
        total += (block.float() - mean).double().square().sum(0)
    return (total / len(rows)).sqrt().float()
