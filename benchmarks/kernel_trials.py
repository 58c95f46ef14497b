"""Ops on fresh random shapes against float64, in units of the rounding error that they may have (`kernel_bounds`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks import adamw_trials, memory_bound_trials, quantize_trials
from benchmarks.kernel_bounds import ROUNDING, Into, U, Worst, chance, integers, placed, size
from megatron_davinci.kernels import cross_entropy_passes as passes
from megatron_davinci.kernels.cross_entropy import IGNORED, vocab_parallel_cross_entropy


def cross_entropy(seed: int, device: torch.device, widest: int = 3000) -> Worst:
    """Losses and gradients of a random case, the vocabulary whole or in parts."""
    g = torch.Generator().manual_seed(seed)
    rows, width, parts = integers(g, 1, 5), size(g, widest), (1, 1, 2, 3)[integers(g, 0, 3)]
    dtype = (torch.float32, torch.bfloat16)[integers(g, 0, 1)]
    whole = width * parts
    tokens = integers(g, 1, whole) if chance(g, 0.5) else whole
    logits = (torch.randn(rows, whole, generator=g) * (0.1, 1, 10)[integers(g, 0, 2)]).to(dtype)
    labels = torch.randint(tokens, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.2] = IGNORED
    if chance(g, 0.2):
        logits[integers(g, 0, rows - 1), integers(g, 0, whole - 1)] = -math.inf
    weights = torch.rand(rows, generator=g) if chance(g, 0.5) else None
    z_loss = 1e-2 if chance(g, 0.5) else 0.0
    by = torch.randn(2, rows, generator=g)
    ones = chance(g, 0.3)  # what scales P - Y is then 1, whatever is added to it
    if ones:
        log_z = logits[:, :tokens].double().logsumexp(-1)
        each = torch.ones(rows) if weights is None else weights.clamp(min=1e-3)
        weights = None if weights is None else each
        by[0] = ((1 - by[1] * each * 2 * z_loss * log_z) / each).nan_to_num(1.0)

    exact = CrossEntropy(logits, labels, tokens, z_loss, weights, by)
    worst = Worst()
    logits, labels, by = placed(logits, g, device), labels.to(device), by.to(device)
    weights = None if weights is None else weights.to(device)
    if parts == 1:
        leaf = logits.clone().requires_grad_()
        losses = vocab_parallel_cross_entropy(
            Into.apply(leaf, logits), labels, tokens=tokens, z_loss=z_loss, weights=weights
        )
        whole_loss = (losses.cross_entropy * by[0]).sum()
        if losses.z_loss is not None:
            whole_loss = whole_loss + (losses.z_loss * by[1]).sum()
        whole_loss.backward()
        worst.see("loss", losses.cross_entropy.detach().cpu(), exact.losses[0], exact.bound_losses[0])
        if losses.z_loss is not None:
            worst.see("z-loss", losses.z_loss.detach().cpu(), exact.losses[1], exact.bound_losses[1])
        worst.see("gradient", leaf.grad.cpu(), exact.gradient, exact.bound_gradient)
        return worst
    pieces = [placed(piece, g, device) for piece in logits.detach().chunk(parts, -1)]
    place = (tokens, IGNORED)
    found = [passes.statistics(piece, labels, n * width, *place) for n, piece in enumerate(pieces)]
    largest = torch.stack([one[0] for one in found]).amax(0)
    factors = [torch.where(one[0] == largest, 1.0, (one[0] - largest).exp()) for one in found]
    log_z = largest + sum(one[1] * factor for one, factor in zip(found, factors, strict=True)).log()
    target = sum(one[2] for one in found)
    loss = torch.where(labels == IGNORED, 0.0, log_z - target)
    if weights is not None:
        loss = loss * weights
    worst.see("loss", loss.cpu(), exact.losses[0], exact.bound_losses[0])
    weight = 1.0 if weights is None else weights
    shift = by[1] * weight * 2 * z_loss * log_z if z_loss else torch.zeros_like(log_z)
    scale = by[0] * weight + shift
    if ones:
        scale = torch.where((scale - 1).abs() < 1e-5, 1.0, scale)
    for n, piece in enumerate(pieces):
        again = placed(piece, g, device)
        passes.gradient_(piece, labels, log_z, n * width, *place)
        passes.scaled_(piece, labels, scale, shift, n * width, *place)
        part = slice(n * width, (n + 1) * width)
        worst.see(
            f"gradient of part {n}", piece.cpu(), exact.gradient[:, part], exact.bound_gradient[:, part]
        )
        passes.backward_(again, labels, log_z, scale, shift, n * width, *place)
        worst.see(
            f"gradient of part {n} at once",
            again.cpu(),
            exact.gradient[:, part],
            exact.bound_gradient[:, part],
        )
    return worst


class CrossEntropy:
    """Losses, the gradient of `sum(by * losses)`, and what rounding may make of them.

    Args:
        logits: [rows, vocabulary].
        labels: [rows].
        tokens: Logits from this one on are padding.
        z_loss: Weight of the z-loss.
        weights: [rows] or None.
        by: [2, rows], gradients of both losses.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, tokens: int, z_loss: float, weights: Tensor | None, by: Tensor
    ) -> None:
        x = logits.double()
        x[:, tokens:] = -math.inf
        keep = labels != IGNORED
        weight = keep.double() if weights is None else keep * weights.double()
        label = labels.clamp(min=0)
        log_z = x.logsumexp(-1)
        target = x.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        zero = torch.zeros_like(log_z)
        # Of an ignored row there is none, also where all its logits are minus infinity.
        self.losses = torch.stack(
            [torch.where(keep, one, 0.0) * weight for one in (log_z - target, z_loss * log_z.square())]
        )
        one_hot = torch.nn.functional.one_hot(label, x.shape[-1]).double()
        probability = (x - log_z.unsqueeze(-1)).exp()
        probability[:, tokens:] = 0.0  # where all logits are minus infinity the others are no numbers
        by = by.double() * weight
        shift = by[1] * 2 * z_loss * log_z if z_loss else zero
        scale = by[0] + shift
        left = probability - one_hot
        self.gradient = scale.unsqueeze(-1) * left + shift.unsqueeze(-1) * one_hot
        self.gradient[~keep] = 0.0

        # An exponential: its argument is a difference (1) times log2(e) (1), and exp2 is off by 2 ulp (4).
        spread = torch.where(x.isfinite(), (x - x.amax(-1, keepdim=True)).abs(), 0.0).amax(-1)
        a_power = 2 * spread + 5
        # A thread's logits one after the other, each with a rescaled sum; then 5 joins in a warp and 5 of warps.
        steps = math.ceil(x.shape[-1] / 512) + 8 + 10 + 3
        e_log_z = U * (a_power + 4 * steps) + 4 * U * (1 + log_z.abs())
        e_loss = e_log_z + U * (log_z.abs() + 3 * (log_z - target).abs())
        e_z = 2 * z_loss * log_z.abs() * e_log_z + 4 * U * self.losses[1].abs()
        self.bound_losses = torch.stack([e_loss * weight, e_z * weight.clamp(min=1e-30)])
        e = ROUNDING[logits.dtype]
        e_power = torch.where(x.isfinite(), (x - log_z.unsqueeze(-1)).abs(), 0.0) * 2 * U + 6 * U
        e_left = probability * (e_log_z.unsqueeze(-1) + e_power) + (e + 2 * U) * left.abs()
        size_, e_scale = scale.abs(), 4 * U * (by.abs().sum(0) + 2 * shift.abs())
        e_shift = 2 * z_loss * by[1].abs() * e_log_z + 4 * U * shift.abs()
        self.bound_gradient = (
            size_.unsqueeze(-1) * e_left
            + (e_scale + e_shift).unsqueeze(-1) * left.abs()
            + e_shift.unsqueeze(-1) * one_hot
            + (e + 3 * U) * (self.gradient.abs() + size_.unsqueeze(-1) * e_left)
        )
        # What an ignored row and padding have is exactly 0.
        self.bound_losses[:, ~keep] = 0.0
        self.bound_gradient[~keep] = 0.0
        self.bound_gradient[:, tokens:] = 0.0


TRIALS = {
    "cross_entropy": cross_entropy,
    "adamw": adamw_trials.adamw,
    "rms_norm": memory_bound_trials.rms_norm,
    "document_bounds": memory_bound_trials.documents,
    "quantize": quantize_trials.quantised,
    "rope": memory_bound_trials.rope,
    "swiglu": memory_bound_trials.gated,
}
"""A random case of each op, by a seed."""
