"""Torch's own FP8 products against the emulated ones."""

from __future__ import annotations

import pytest
import torch

from megatron_davinci.precision import products
from megatron_davinci.precision.formats import E4M3, E5M2
from megatron_davinci.precision.scaling import Quantizer, quantize


def operands(left, right, seed, rows=48, columns=80, inner=64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, inner, generator=generator) * torch.exp(
        2 * torch.randn(rows, 1, generator=generator)
    )
    b = torch.randn(columns, inner, generator=generator) / 100
    return quantize(a, Quantizer(left)), quantize(b, Quantizer(right))


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of their dtype lie between."""
    kind = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[a.dtype]
    lowest = torch.iinfo(kind).min

    def place(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(kind).long()
        return torch.where(bits < 0, lowest - bits, bits)

    return (place(a) - place(b)).abs()


@pytest.mark.parametrize(("left", "right"), [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("seed", range(4))
def test_native_and_emulated_products_differ_by_one_place_at_most(left, right, seed):
    a, b = operands(left, right, seed)
    assert (
        int(ulps(products.native(a, b, torch.bfloat16), products.emulated(a, b, torch.bfloat16)).max()) <= 1
    )
    # In fp32 what differs is the order of a sum: it is held against the sum of sizes.
    ours, theirs = products.native(a, b, torch.float32), products.emulated(a, b, torch.float32)
    sizes = a.dequantized().abs() @ b.dequantized().abs().t()
    assert float(((ours - theirs).abs() / sizes).max()) < 2e-6


def test_where_sums_are_exact_they_are_equal_to_the_bit():
    """Small whole numbers, and scales that are powers of two."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-15, 16, (32, 64), generator=generator).float()
    b = torch.randint(-15, 16, (16, 64), generator=generator).float()
    a[0, 0] = b[0, 0] = 14.0
    left, right = (
        quantize(one, Quantizer(E4M3), amax=torch.tensor(14.0))
        for one in (a.clamp(-14, 14), b.clamp(-14, 14))
    )
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(products.native(left, right, dtype), products.emulated(left, right, dtype))
        exact = (
            a.clamp(-14, 14).to(torch.float8_e4m3fn).float()
            @ b.clamp(-14, 14).to(torch.float8_e4m3fn).float().t()
        )
        assert torch.equal(products.native(left, right, dtype), exact.to(dtype))
