"""The output layer and its cross entropy, some tokens at a time: no rank ever holds the logits of all of them.

Forward computes the logits of a chunk, keeps three fp32 numbers a token and drops them; backward computes them again,
turns them into their gradient where they are, and multiplies on. So a chunk's logits are all that there is beside
hidden states, weights and gradients, for a third of the output layer's products more. That any gradient of the losses
may come is why they are computed again: what forward could compute in advance, it could not scale a token at a time.

The weight's gradient is added straight to `main_grad`, the fp32 sum that Megatron-Core keeps, where there is one. To
add up in bf16 would lose small gradients, the more chunks there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_davinci.kernels.cross_entropy import (
    IGNORED,
    Losses,
    check_labels,
    losses_of,
    over_ranks,
    scale_and_shift,
)
from megatron_davinci.kernels.cross_entropy_passes import backward_, statistics
from megatron_davinci.kernels.main_gradient import MainGradient

CHUNK = 2048
"""Tokens, by default: enough that products are large, and 0.6 GB of bf16 logits at 151,936 tokens on one rank."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    tokens: int | None = None,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
    ignored: int = IGNORED,
    chunk: int = CHUNK,
) -> Losses:
    """`vocab_parallel_cross_entropy` of `hidden @ weight.t()`, without the logits.

    Args:
        hidden: [..., hidden size] bf16 or fp32, the same on all ranks of the group. Its gradient is this rank's part,
            whose sum over the group is the whole.
        weight: [vocabulary on this rank, hidden size] of the same dtype. Where it has a `main_grad`, as in Megatron-
            Core's DistributedDataParallel, its gradient is added to that, and `grad_added_to_main_grad` says so.
        labels: [...] int64, of the whole vocabulary.
        group: Of the ranks that hold the parts of the vocabulary; None where it is whole.
        tokens: Logits at and past this one are padding, which has no probability; default: there is none.
        z_loss: Weight of the z-loss.
        weights: [...] which each label's losses are multiplied by, in fp32; they get no gradient.
        ignored: A label that has no loss.
        chunk: Tokens whose logits are there at once.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together.
        DataError: On a CPU: a label is no token.
    """
    _check(hidden, weight, labels, weights, chunk)
    width = weight.shape[0]
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    whole = width * ranks if tokens is None else tokens
    if not 0 < whole <= width * ranks:
        raise ValueError(f"tokens is {whole}, and the vocabulary has {width * ranks} rows")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, whole, ignored)
    flat = hidden.reshape(-1, hidden.shape[-1])
    flat_weights = None if weights is None else weights.reshape(-1).float()
    both = _Chunked.apply(
        flat,
        weight,
        labels.reshape(-1).contiguous(),
        flat_weights,
        group,
        (rank * width, whole, ignored),
        z_loss,
        chunk,
    )
    return Losses(both[0].view(labels.shape), both[1].view(labels.shape) if z_loss else None)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        group: dist.ProcessGroup | None,
        place: tuple[int, int, int],
        z_loss: float,
        chunk: int,
    ) -> Tensor:
        found = [statistics(logits, labels[part], *place) for part, logits in _logits(hidden, weight, chunk)]
        parts = (
            (torch.cat([one[n] for one in found]) for n in range(3))
            if found
            else hidden.new_zeros(3, 0).float()
        )
        largest, total, target = parts
        log_z, target = over_ranks((largest, total, target), group)
        ctx.save_for_backward(hidden, weight, labels, log_z, weights)
        ctx.place, ctx.z_loss, ctx.chunk, ctx.parameter = place, z_loss, chunk, weight
        return losses_of(log_z, target, labels, weights, z_loss, place[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z, weights = ctx.saved_tensors
        scale, shift = scale_and_shift(by_losses, log_z, weights, ctx.z_loss)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = MainGradient(ctx.parameter) if ctx.needs_input_grad[1] else None
        for part, logits in _logits(hidden, weight, ctx.chunk):
            backward_(logits, labels[part], log_z[part], scale[part], shift[part], *ctx.place)
            if by_hidden is not None:
                torch.mm(logits, weight, out=by_hidden[part])
            if total is not None:
                total.add(logits, hidden[part])
        return (by_hidden, None if total is None else total.gradient(), *[None] * 6)


def _logits(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """The logits of chunk after chunk, in one place."""
    rows = len(hidden)
    room = hidden.new_empty(min(chunk, rows), weight.shape[0])
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        yield part, torch.mm(hidden[part], weight.t(), out=room[: part.stop - first])


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, chunk: int) -> None:
    if hidden.dim() < 1 or labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels are {list(labels.shape)} for hidden states of {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"the weight is {list(weight.shape)} for hidden states of {list(hidden.shape)}")
    if not hidden.dtype.is_floating_point or hidden.dtype != weight.dtype or labels.dtype != torch.int64:
        raise ValueError(
            f"hidden states are {hidden.dtype}, the weight {weight.dtype}, labels {labels.dtype}: two floats of one "
            "dtype and torch.int64 are expected"
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights are {list(weights.shape)} for labels of {list(labels.shape)}")
    if chunk < 1:
        raise ValueError(f"a chunk has {chunk} tokens")
    for name, tensor in (("the weight", weight), ("labels", labels), ("weights", weights)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden states are on {hidden.device}, {name} on {tensor.device}")
