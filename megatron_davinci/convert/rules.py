"""The words in which a family says how its tensors map. A rule is used in both directions, so it cannot be right
one way and wrong the other.

A rule pairs one Megatron-Core tensor with one or more Hugging Face tensors. `{layer}` in a name stands for the
number of a transformer layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """What the cuts need to know of a model.

    Attributes:
        heads: Query heads.
        groups: Key/value heads.
        dim: Channels of a head.
        padding: Rows at the end of the vocabulary that are no token's.
    """

    heads: int
    groups: int
    dim: int
    padding: int = 0

    @classmethod
    def of(cls, model: dict[str, Any]) -> Heads:
        """Those of a model, from the `model` section of its configuration."""
        heads = model["num_attention_heads"]
        dim = model["head_dim"] or model["hidden_size"] // heads
        return cls(heads, model["num_query_groups"], dim, model.get("vocab_padding") or 0)


def sizes(model: dict[str, Any]) -> dict[str, int]:
    """What the size names of rules stand for in a model, from the `model` section of its configuration."""
    heads = Heads.of(model)
    return {
        "vocab": model["vocab_size"],
        "hidden": model["hidden_size"],
        "dim": heads.dim,
        "q": heads.heads * heads.dim,
        "kv": heads.groups * heads.dim,
        "qkv": (heads.heads + 2 * heads.groups) * heads.dim,
        "ffn": model["ffn_hidden_size"],
        "gate_up": 2 * model["ffn_hidden_size"],
    }


class Cut(Protocol):
    """How one Megatron-Core tensor is cut into Hugging Face tensors, and put together again."""

    def split(self, whole: Tensor, heads: Heads) -> Sequence[Tensor]:
        """Megatron-Core to Hugging Face."""
        ...

    def merge(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """Hugging Face to Megatron-Core."""
        ...


class Same:
    """One tensor, unchanged."""

    def split(self, whole: Tensor, heads: Heads) -> Sequence[Tensor]:
        """The tensor."""
        return (whole,)

    def merge(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """The tensor."""
        return parts[0]


SAME = Same()


class GroupedQKV:
    """Query, key and value projections, interleaved by key/value head in Megatron-Core.

    For each key/value head: the rows of the query heads that it serves, then its own key rows, then its value
    rows. Weights are [(heads + 2 * groups) * dim, hidden], biases [(heads + 2 * groups) * dim].
    """

    def split(self, whole: Tensor, heads: Heads) -> Sequence[Tensor]:
        """To (q [heads * dim, ...], k [groups * dim, ...], v [groups * dim, ...])."""
        queries = heads.heads // heads.groups * heads.dim
        by_group = whole.unflatten(0, (heads.groups, queries + 2 * heads.dim))
        return [part.flatten(0, 1) for part in by_group.split([queries, heads.dim, heads.dim], dim=1)]

    def merge(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """From (q, k, v)."""
        by_group = [part.unflatten(0, (heads.groups, part.shape[0] // heads.groups)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)


class Stacked:
    """Two matrices stacked by rows: the gate projection over the up projection."""

    def split(self, whole: Tensor, heads: Heads) -> Sequence[Tensor]:
        """To the upper and the lower half."""
        return whole.chunk(2, dim=0)

    def merge(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """From the upper and the lower half."""
        return torch.cat(list(parts), dim=0)


class Padded:
    """A row a token, and in Megatron-Core rows of zeros behind them, so that tensor ranks divide the vocabulary."""

    def split(self, whole: Tensor, heads: Heads) -> Sequence[Tensor]:
        """To the tokens' rows."""
        return (whole[: len(whole) - heads.padding],)

    def merge(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """From the tokens' rows."""
        (rows,) = parts
        if not heads.padding:
            return rows
        return torch.cat([rows, rows.new_zeros(heads.padding, *rows.shape[1:])])


@dataclass(frozen=True)
class Rule:
    """One Megatron-Core tensor and its Hugging Face tensors.

    Attributes:
        mcore: Name in Megatron-Core, as its checkpoints write it: a norm is named with the projection that it
            feeds, as in Transformer Engine's fused layers. In a `torch_dist` checkpoint the name lacks the layer's
            number, and layers are stacked along a first axis.
        hf: Names in Hugging Face.
        shape: Of the Megatron-Core tensor of one layer, in the names of `sizes`.
        cut: How they relate.
        when: Field of the model configuration that must be true for the rule to hold; a leading `not ` negates.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    cut: Cut = SAME
    when: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return "{layer}" in self.mcore

    @property
    def stored(self) -> str:
        """The tensor's key in a `torch_dist` checkpoint."""
        return self.mcore.replace(".{layer}", "")

    def stored_shape(self, model: dict[str, Any]) -> tuple[int, ...]:
        """The shape of `stored` in a checkpoint of a model."""
        known = sizes(model)
        layers = (model["num_layers"],) if self.per_layer else ()
        return (*layers, *(known[name] for name in self.shape))

    def holds(self, model: dict[str, Any]) -> bool:
        """Whether a model has the tensor."""
        return _holds(self.when, model)


@dataclass(frozen=True)
class Zeros:
    """A tensor that Hugging Face's layer has and ours has not. It goes out as zeros, and only zeros come in.

    Attributes:
        hf: Its name.
        shape: In the names of `sizes`.
        when: As in `Rule`.
    """

    hf: str
    shape: tuple[str, ...]
    when: str | None = None

    def holds(self, model: dict[str, Any]) -> bool:
        """Whether the model in Hugging Face has it."""
        return _holds(self.when, model)


def _holds(when: str | None, model: dict[str, Any]) -> bool:
    if when is None:
        return True
    negated, field = when.startswith("not "), when.removeprefix("not ")
    return bool(model.get(field)) != negated


def hf_shapes(rule: Rule, model: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of a rule's Hugging Face tensors, of one layer."""
    known = sizes(model)
    whole = torch.empty([known[name] for name in rule.shape], device="meta")
    return [tuple(part.shape) for part in rule.cut.split(whole, Heads.of(model))]


def to_hf(rule: Rule, whole: Tensor, layer: int | None, heads: Heads) -> dict[str, Tensor]:
    """Apply a rule from Megatron-Core to Hugging Face.

    Args:
        rule: The rule.
        whole: The Megatron-Core tensor.
        layer: Number of the layer, for rules of layers.
        heads: The model's heads.

    Returns:
        Hugging Face tensors by name, contiguous.
    """
    parts = rule.cut.split(whole, heads)
    return {name.format(layer=layer): part.contiguous() for name, part in zip(rule.hf, parts, strict=True)}


def from_hf(rule: Rule, tensors: dict[str, Tensor], layer: int | None, heads: Heads) -> Tensor:
    """Apply a rule from Hugging Face to Megatron-Core.

    Args:
        rule: The rule.
        tensors: Hugging Face tensors by name.
        layer: Number of the layer, for rules of layers.
        heads: The model's heads.
    """
    return rule.cut.merge([tensors[name.format(layer=layer)] for name in rule.hf], heads)
