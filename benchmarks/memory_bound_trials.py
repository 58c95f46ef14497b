"""Trials of the ops that do little more than read and write."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernel_bounds import ROUNDING, U, Worst, chance, integers, placed, size
from megatron_davinci.kernels import rms_norm as norms

DTYPES = (torch.float32, torch.bfloat16)


def put(values: Tensor, g: torch.Generator, device: torch.device, aligned: bool) -> Tensor:
    """A tensor on a device: where 16 bytes begin, which is fast, or at a random address."""
    return values.to(device) if aligned else placed(values, g, device)


def rms_norm(seed: int, device: torch.device) -> Worst:
    """Rows and gradients of a random case, with a residual or without."""
    g = torch.Generator().manual_seed(seed)
    dtype, rows = DTYPES[integers(g, 0, 1)], integers(g, 1, 40)
    width = (size(g, 5000), 8 * size(g, 600), 8 * size(g, 64))[integers(g, 0, 2)]
    rows = min(rows, max(1, 40_000 // width))
    aligned, added, along = (chance(g, p) for p in (0.7, 0.6, 0.8))
    eps = (1e-6, 1e-5, 0.5)[integers(g, 0, 2)]

    def draw(*shape: int) -> Tensor:
        scale = (1e-3, 1, 30)[integers(g, 0, 2)]
        return put((scale * torch.randn(*shape, generator=g)).to(dtype), g, device, aligned)

    x, residual, by_normal, by_total = (draw(rows, width) for _ in range(4))
    weight = draw(width)
    if chance(g, 0.2):
        x[0] = 0
    leaves = [x.clone(), residual.clone(), weight.clone()]
    if not aligned:
        leaves = [placed(leaf, g, device) for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    worst = Worst()
    if added:
        normal, total = norms.add_rms_norm(*leaves, eps)
        exact = x.double() + residual.double()
        worst.see("sum", total.detach(), exact, (ROUNDING[dtype] + 2 * U) * exact.abs())
        outputs, gradients = ([normal, total], [by_normal, by_total]) if along else ([normal], [by_normal])
        by_x, by_residual, by_weight = torch.autograd.grad(outputs, leaves, gradients)
        worst.see("gradient of the residual", by_residual, by_x, torch.zeros_like(by_x, dtype=torch.float64))
    else:
        total, along = leaves[0], False
        normal = norms.rms_norm(total, leaves[2], eps)
        by_x, by_weight = torch.autograd.grad(normal, (total, leaves[2]), by_normal)
    right = RMSNorm(total.detach(), weight, eps, by_normal, by_total if along else None)
    for name, found in (("normal", normal.detach()), ("by_x", by_x), ("by_weight", by_weight)):
        worst.see(name, found, getattr(right, name), getattr(right, f"bound_{name}"))
    return worst


class RMSNorm:
    """Normalised rows, the gradients of `sum(by_normal * normal + by_total * x)`, and what rounding may make of them.

    Args:
        x: [rows, width].
        weight: [width].
        eps: Added to the mean square.
        by_normal: [rows, width].
        by_total: The same, or None.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, eps: float, by_normal: Tensor, by_total: Tensor | None
    ) -> None:
        e = ROUNDING[x.dtype]
        rows, width = x.shape
        x, weight, above = x.double(), weight.double(), by_normal.double()
        beside = torch.zeros_like(x) if by_total is None else by_total.double()
        s = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = x * s
        self.normal = n * weight
        # What one thread adds one after the other, then a warp's lanes and a block's warps.
        steps = max(16, width / 256 + 8) + 12
        e_s = (steps + 2) / 2 * U + 3 * U
        self.bound_normal = self.normal.abs() * (e_s + 2 * U + e * (1 + 2 * e_s + 8 * U))

        a = above * weight
        along = (a * n).mean(-1, keepdim=True)
        most = (a * n).abs().mean(-1, keepdim=True)
        value = (a - n * along) * s
        self.by_x = value + beside
        e_along = most * (e_s + (steps + 4) * U)
        bound = s * (2 * a.abs() * U + n.abs() * (along.abs() * (e_s + 3 * U) + e_along))
        bound = bound + value.abs() * (e_s + 2 * U) + 2 * U * self.by_x.abs()
        self.bound_by_x = bound + e * (self.by_x.abs() + bound)

        self.by_weight = (above * n).sum(0)
        sums = (above * n).abs().sum(0) * (e_s + (rows + 4) * U)
        self.bound_by_weight = sums + e * (self.by_weight.abs() + sums)
