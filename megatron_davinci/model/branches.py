"""Sequences that begin alike, computed once: rows of branching sequences, and keys and values kept for what follows.

A row holds tokens of several sequences. Where two of them begin with the same tokens, those are there once, and each
goes on from them: a token sees the tokens that lead to it and no others, and its position is the number of those. So
what comes out at a token is what it would be in its sequence alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional as F

# Columns by which a cache grows: fewer copies than one a token, less memory than all at once.
GROWTH = 64


class Kept(NamedTuple):
    """Keys and values of one layer, each [sequences, heads on this rank, columns, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass
class KeyValueCache:
    """Keys and values of sequences that are being continued, all ending in the same column.

    Attributes:
        used: Columns that hold something. A shorter sequence begins further to the right.
        layers: By the layer's number.
    """

    used: int = 0
    layers: dict[int, Kept] = field(default_factory=dict)

    @classmethod
    def joined(cls, caches: Sequence[KeyValueCache]) -> KeyValueCache:
        """The sequences of several caches, which all end in the same column."""
        first = caches[0]
        if len(caches) == 1:
            return first
        layers = {
            layer: Kept(
                *(torch.cat(parts) for parts in zip(*(one.layers[layer] for one in caches), strict=True))
            )
            for layer in first.layers
        }
        return cls(first.used, layers)

    def append(self, layer: int, key: Tensor, value: Tensor) -> Kept:
        """Put one more token behind every sequence.

        Args:
            layer: The layer's number.
            key: [1, sequences, heads, head_dim].
            value: As `key`.

        Returns:
            The columns that are used, with the new one; `advance` makes it the last of `used`.
        """
        kept = self.layers[layer]
        if kept.keys.shape[2] == self.used:
            kept = Kept(*(F.pad(x, (0, 0, 0, GROWTH)) for x in kept))
            self.layers[layer] = kept
        for all_of_them, new in zip(kept, (key, value), strict=True):
            all_of_them[:, :, self.used] = new[0]
        return Kept(*(x[:, :, : self.used + 1] for x in kept))

    def advance(self) -> None:
        """All layers have appended a token."""
        self.used += 1

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences only, [kept] int64."""
        self.layers = {
            layer: Kept(*(x.index_select(0, sequences) for x in kept)) for layer, kept in self.layers.items()
        }


@dataclass
class Branches(PackedSeqParams):
    """How the tokens of a forward pass lead to each other, on the way through Megatron-Core's layers to attention.

    As with `Documents`, tokens stay [length, rows, ...] between the layers.

    Attributes:
        positions: [rows, length] int64.
        sees: [rows, 1, length, keys] bool, the keys that each token sees; None where each sees itself and all before
            it. Keys are the row's tokens, or what `cache` has and the token itself.
        outputs: [outputs] int64, the tokens whose logits are wanted, counted as `row * length + place`.
        read: Is given their logits, [some of the outputs, vocabulary on this rank], and the first one's number, and
            returns what is to be kept of them, [some, ...].
        at_once: Outputs whose logits are made at once.
        states: Whether `read` is given the states that logits are made of, [some, hidden], and no logits.
        keep: [sequences, columns] int64: the tokens whose keys and values begin `cache`, counted likewise; None
            where tokens are appended to it.
        cache: Keys and values to begin, or to append to; None for none.
    """

    positions: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    sees: Tensor | None = None
    outputs: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    read: Callable[[Tensor, int], Tensor] | None = None
    at_once: int = 1024
    states: bool = False
    keep: Tensor | None = None
    cache: KeyValueCache | None = None

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"
        self._mask: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer, which keeps or appends keys and values.

        Args:
            layer: The layer's number.
            query: [length, rows, heads on this rank, head_dim], rotated.
            key: [length, rows, key/value heads on this rank, head_dim], rotated.
            value: As `key`.
            scale: Of the scores.

        Returns:
            [length, rows, heads on this rank, head_dim].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None and self.keep is not None:
            self.cache.layers[layer] = Kept(*(self._kept(x) for x in (key, value)))
        elif self.cache is not None:
            k, v = self.cache.append(layer, key, value)
        if self.sees is not None and self._mask is None:
            # Once, where attention would make the same of it in every layer.
            self._mask = torch.zeros_like(self.sees, dtype=q.dtype).masked_fill_(~self.sees, float("-inf"))
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1 and q.shape[2] == 1:
            # One query for each head: those that share keys become the queries of one head, and nothing is repeated.
            q = q.squeeze(2).unflatten(1, (-1, repeats))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, scale=scale)
            return out.flatten(1, 2).unsqueeze(0)
        causal = self.sees is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask, is_causal=causal, enable_gqa=repeats > 1, scale=scale
        )
        return out.permute(2, 0, 1, 3)

    def _kept(self, part: Tensor) -> Tensor:
        """[length, rows, heads, head_dim] -> [sequences, heads, columns, head_dim]."""
        assert self.keep is not None
        tokens = part.transpose(0, 1).flatten(0, 1)
        taken = tokens.index_select(0, self.keep.flatten()).unflatten(0, self.keep.shape)
        return taken.transpose(1, 2).contiguous()
