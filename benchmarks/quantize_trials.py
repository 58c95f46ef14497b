"""Quantising kernels on fresh random matrices against `precision.scaling`: every code and every scale, to the bit."""

from __future__ import annotations

import math

import torch

from benchmarks.kernel_bounds import Worst, chance, integers, placed
from megatron_davinci.kernels import rms_norm
from megatron_davinci.kernels.made import Gated, GatedGradient, Matrix, Normed, written
from megatron_davinci.kernels.quantize import quantize
from megatron_davinci.precision import scaling
from megatron_davinci.precision.formats import E4M3, E5M2
from megatron_davinci.precision.scaling import Quantizer

KINDS = {"tensor": ("tensor", "fp32"), "rows": ("row", "power_of_two"), "tiles": ("tile", "power_of_two")}


def quantised(seed: int, device: torch.device) -> Worst:
    """A random matrix in one format with one kind of scales, as it is and transposed, in memory or to be made."""
    g = torch.Generator().manual_seed(seed)
    scales, form = ("tensor", "rows", "tiles")[integers(g, 0, 2)], (E4M3, E5M2)[integers(g, 0, 1)]
    turned, step = chance(g, 0.7), 16 if chance(g, 0.9) else 1
    plain = not turned or chance(g, 0.7)
    rows, columns = (step * integers(g, 1, 18) for _ in range(2))
    if scales == "tiles" or (scales == "rows" and turned):
        rows = 128 * integers(g, 1, 2)
    if scales == "tiles" or (scales == "rows" and plain):
        columns = 128 * integers(g, 1, 2)
    made = "none" if scales == "tiles" else ("none", "swiglu", "norm")[integers(g, 0, 2)]
    if scales == "tensor" and chance(g, 0.5):
        made = "swiglu_gradient"
        columns *= 1 if columns % 2 == 0 and chance(g, 0.3) else 2
    width = 2 * columns if made == "swiglu" else columns
    x = torch.randn(rows, width, generator=g) * torch.exp(4 * torch.randn(rows, 1, generator=g))
    # Squares of the smallest are lost beside what is added to them, and those of the largest are infinite.
    x *= ((1e-38, 1.0, 1.0, 1e30) if made == "none" else (1e-3, 1.0, 1.0, 1e3))[integers(g, 0, 3)]
    x[torch.rand(rows, width, generator=g) < 0.1] = -0.0
    if chance(g, 0.3):
        x[:128, : columns // 2] = 0.0
    if chance(g, 0.1):
        x[integers(g, 0, rows - 1), integers(g, 0, width - 1)] = (math.inf, math.nan)[integers(g, 0, 1)]
    if chance(g, 0.5):
        x = x.bfloat16()
    given = placed(x, g, device) if chance(g, 0.2) else x.to(device)
    matrix = _to_be_made(given, made, g)
    x = written(matrix).cpu()
    known = None
    if scales == "tensor" and chance(g, 0.5):
        known = x.float().abs().amax().nan_to_num(1.0) * (0.3, 1.0, 7.0)[integers(g, 0, 2)]
    found = quantize(
        matrix,
        form.dtype,
        scales,
        plain=plain,
        turned=turned,
        known=None if known is None else known.to(device),
    )
    blocks, kind = KINDS[scales]
    how, worst = Quantizer(form, blocks, 0 if blocks == "tensor" else 128, kind), Worst()
    for name, one, matrix in (("plain", found.plain, x), ("turned", found.turned, x.t())):
        if one is None:
            continue
        right = scaling.quantize(matrix.contiguous().float(), how, amax=known)
        pairs = (
            ("codes", one.codes.cpu().float(), right.values),
            ("inverse scales", one.inverse.cpu(), right.inverse.reshape(one.inverse.shape)),
            ("amax", found.amax.cpu(), right.amax.abs()),
        )
        for what, ours, theirs in pairs:
            worst.see(f"{name} {what}", ours, theirs, torch.zeros_like(theirs))
            signs = ours.signbit() != theirs.signbit()
            if (signs & ~theirs.isnan()).any():
                worst.ratio, worst.what = math.inf, f"signs of {name} {what}"
    return worst


def _to_be_made(rows: torch.Tensor, made: str, g: torch.Generator) -> Matrix:
    """What SwiGLU, its gradient or RMSNorm makes of rows; other kernels, or torch, then write it to compare with."""
    if made == "swiglu":
        return Gated(rows)
    if made == "none":
        return rows
    if made == "swiglu_gradient":
        by_product = torch.randn(rows.shape[0], rows.shape[1] // 2, generator=g).to(rows)
        return GatedGradient(rows, by_product)
    weight = (1 + 0.1 * torch.randn(rows.shape[1], generator=g)).to(rows)
    return Normed(rows, weight, rms_norm.scale_of(rows, weight, 1e-6))
