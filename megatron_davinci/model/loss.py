"""Cross entropy with a z-loss beside it, over a vocabulary that is split over tensor ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Parts
from torch import Tensor


def cross_entropy_and_z_loss(logits: Tensor, labels: Tensor, coefficient: float) -> Tensor:
    """The loss of each label, and `coefficient * log(Z)^2`, with `Z` the sum of the exponentials of its logits.

    This z-loss keeps `log Z` near 0, so that logits do not drift away together, which cross entropy does not notice
    (Chowdhery et al., 2022, PaLM, arXiv 2204.02311, section 5).

    Args:
        logits: [sequence, batch, vocabulary on this rank]; computed in fp32. As in Megatron-Core's own loss, fp32
            logits are overwritten.
        labels: [sequence, batch] int64.
        coefficient: Weight of the z-loss.

    Returns:
        [2, sequence, batch] fp32: cross entropy, z-loss; nats.
    """
    losses: Tensor = _CrossEntropyAndZLoss.apply(logits, labels, coefficient)
    return losses


class _CrossEntropyAndZLoss(torch.autograd.Function):
    """Megatron-Core's parts of the vocabulary-parallel cross entropy, which know `Z` and forget it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, coefficient: float) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        shifted, largest = Parts.calculate_logits_max(logits)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        first = parallel_state.get_tensor_model_parallel_rank() * shifted.shape[-1]
        elsewhere, label_here, predicted, total, exponentials = Parts.calculate_predicted_logits(
            shifted, labels, largest, first, first + shifted.shape[-1]
        )
        dist.all_reduce(predicted, group=group)
        dist.all_reduce(total, group=group)
        log_z = total.log() + largest
        softmax, loss = Parts.calculate_cross_entropy_loss(exponentials, predicted, total)
        ctx.coefficient = coefficient
        ctx.save_for_backward(softmax, elsewhere, label_here, log_z)
        return torch.stack([loss, coefficient * log_z.square()])

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        softmax, elsewhere, label_here, log_z = ctx.saved_tensors
        by_loss, by_z = gradients[0], gradients[1] * (2 * ctx.coefficient) * log_z
        # d loss = softmax - onehot(label), d log Z = softmax. In place: nobody else has the softmax.
        rows, row, here, gradient = Parts.prepare_gradient_calculation_operands(softmax, elsewhere)
        gradient.mul_((by_loss + by_z).unsqueeze(-1))
        rows[row, label_here] -= here * by_loss.reshape(-1)
        return gradient, None, None
