"""Cross entropy over a vocabulary split over ranks, in place: logits become P - Y, and nothing of their size is made.

Transformer Engine's and Liger's cross entropies each keep an fp32 buffer of the logits' size, and Megatron-Core's own
several. Here a rank keeps a few fp32 numbers a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_davinci.errors import DataError
from megatron_davinci.kernels.cross_entropy_passes import gradient_, scaled_, statistics, whole_

IGNORED = -100
"""The label of a token that has no loss, as in torch."""


class Losses(NamedTuple):
    """Of each label.

    Attributes:
        cross_entropy: fp32, of the labels' shape; nats.
        z_loss: The same of the z-loss; None without one.
    """

    cross_entropy: Tensor
    z_loss: Tensor | None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    tokens: int | None = None,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
    ignored: int = IGNORED,
) -> Losses:
    """Cross entropy and z-loss of each label. The logits are overwritten where a gradient will be wanted.

    Of logits x and label y: `log Z - x_y`, and `z_loss * (log Z)^2` (Chowdhery et al., 2022, PaLM, section 5), with
    `Z` the sum of exp(x). Backward takes the gradient from where the logits were, once.

    Args:
        logits: [..., vocabulary on this rank] bf16 or fp32, contiguous; not a leaf, and used by nobody else. Kernels
            compute in fp32. The vocabulary is split evenly over the group, in the order of its ranks.
        labels: [...] int64, of the whole vocabulary.
        group: Of the ranks that hold the parts of the vocabulary; None where it is whole.
        tokens: Logits at and past this one are padding, which has no probability; default: there is none.
        z_loss: Weight of the z-loss.
        weights: [...] which each label's losses are multiplied by, in fp32; they get no gradient.
        ignored: A label that has no loss.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together, or logits are a leaf that wants a gradient.
        DataError: On a CPU: a label is no token. On a GPU its loss is no number, since asking would stop the GPU.
    """
    _check(logits, labels, weights)
    width = logits.shape[-1]
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    whole = width * ranks if tokens is None else tokens
    if not 0 < whole <= width * ranks:
        raise ValueError(f"tokens is {whole}, and the vocabulary has {width * ranks} rows")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, whole, ignored)
    flat, flat_labels = logits.view(-1, width), labels.reshape(-1).contiguous()
    # Kernels read fp32, and a mask may come as anything.
    flat_weights = None if weights is None else weights.reshape(-1).float()
    arguments = (flat_labels, flat_weights, group, rank * width, whole, z_loss, ignored)
    if torch.is_grad_enabled() and logits.requires_grad:
        both = _InPlace.apply(flat, *arguments)
    else:
        parts = statistics(flat, flat_labels, rank * width, whole, ignored)
        log_z, target = over_ranks(parts, group)
        both = losses_of(log_z, target, flat_labels, flat_weights, z_loss, ignored)
    return Losses(both[0].view(labels.shape), both[1].view(labels.shape) if z_loss else None)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        group: dist.ProcessGroup | None,
        first: int,
        tokens: int,
        z_loss: float,
        ignored: int,
    ) -> Tensor:
        if group is None or group.size() == 1:
            log_z, target = whole_(logits, labels, tokens, ignored)
        else:
            log_z, target = over_ranks(statistics(logits, labels, first, tokens, ignored), group)
            gradient_(logits, labels, log_z, first, tokens, ignored)
        # Detached: what autograd knows of the logits as a view ends here, and only their memory is wanted.
        ctx.save_for_backward(logits.detach(), labels, log_z, weights)
        ctx.place, ctx.z_loss, ctx.taken = (first, tokens, ignored), z_loss, False
        return losses_of(log_z, target, labels, weights, z_loss, ignored)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_losses: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.taken:
            raise RuntimeError(
                "backward was called twice: the gradient of the logits was handed out the first time"
            )
        ctx.taken = True
        logits, labels, log_z, weights = ctx.saved_tensors
        scaled_(logits, labels, *scale_and_shift(by_losses, log_z, weights, ctx.z_loss), *ctx.place)
        return (logits, *[None] * 7)


def scale_and_shift(
    by_losses: Tensor, log_z: Tensor, weights: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    """What P - Y is multiplied by and Y is added times, to be the gradient: d loss = P - Y, d log Z = (P - Y) + Y.

    Args:
        by_losses: [2, rows], gradients of what `losses_of` returned.
        log_z: [rows] fp32.
        weights: [rows] fp32 or None.
        z_loss: Weight of the z-loss.
    """
    by_loss = by_losses[0].float() if weights is None else by_losses[0].float() * weights
    if not z_loss:
        return by_loss.contiguous(), torch.zeros_like(log_z)
    by_z = by_losses[1].float() * (2 * z_loss) * log_z
    if weights is not None:
        by_z = by_z * weights
    return by_loss + by_z, by_z.contiguous()


def over_ranks(
    statistics_: tuple[Tensor, Tensor, Tensor], group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """log Z and the logit of the label, of the whole vocabulary."""
    largest, total, target = statistics_
    if group is not None and group.size() > 1:
        here = largest
        largest = here.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # Of two infinities the difference is no number.
        factor = torch.where(here == largest, 1.0, (here - largest).exp())
        both = torch.stack([total * factor, target])
        dist.all_reduce(both, group=group)
        total, target = both[0], both[1]
    return largest + total.log(), target


def losses_of(
    log_z: Tensor, target: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float, ignored: int
) -> Tensor:
    """Cross entropy and z-loss of each row: [2, rows] fp32."""
    both = torch.stack([log_z - target, z_loss * log_z.square() if z_loss else torch.zeros_like(log_z)])
    both = both.masked_fill(labels == ignored, 0.0)
    return both if weights is None else both * weights


def _check(logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels are {list(labels.shape)} for logits of {list(logits.shape)}")
    if not logits.dtype.is_floating_point or labels.dtype != torch.int64:
        raise ValueError(
            f"logits are {logits.dtype}, labels {labels.dtype}: floats and torch.int64 are expected"
        )
    if not logits.is_contiguous():
        raise ValueError("logits are not contiguous, so they cannot be overwritten as rows")
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits are a leaf that wants a gradient, and would be overwritten")
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights are {list(weights.shape)} for labels of {list(labels.shape)}")
    for name, tensor in (("labels", labels), ("weights", weights)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"logits are on {logits.device}, {name} on {tensor.device}")


def check_labels(labels: Tensor, tokens: int, ignored: int) -> None:
    """Raise a DataError that names a label that is no token. Looks at them, so it is for a CPU."""
    wrong = ((labels < 0) | (labels >= tokens)) & (labels != ignored)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise DataError(
            "A label is no token of the vocabulary.",
            where=f"label at {place} of {list(labels.shape)}; {int(wrong.sum())} such labels in all",
            found=int(labels[tuple(place)]),
            expected=f"0 to {tokens - 1}, or {ignored} for a label without a loss",
            do="check that the data were tokenized for this model's vocabulary: `davinci data verify`",
        )
