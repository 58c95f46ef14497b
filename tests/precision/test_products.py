"""Torch's own FP8 products against the emulated ones."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_davinci.kernels.quantize import Codes
from megatron_davinci.kernels.quantize import quantize as in_codes
from megatron_davinci.precision import products
from megatron_davinci.precision.formats import E4M3, E5M2
from megatron_davinci.precision.scaling import Quantizer, quantize

BLOCKS = {
    "rows": Quantizer(E4M3, "row", 128, "power_of_two"),
    "tiles": Quantizer(E4M3, "tile", 128, "power_of_two"),
}


def native(a, b, dtype):
    """By torch's kernels, of the codes of what is emulated."""
    return products.native(*(Codes(one.values.to(one.dtype), one.inverse, "tensor") for one in (a, b)), dtype)


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
    assert int(ulps(native(a, b, torch.bfloat16), products.emulated(a, b, torch.bfloat16)).max()) <= 1
    # In fp32 what differs is the order of a sum: it is held against the sum of sizes.
    ours, theirs = native(a, b, torch.float32), products.emulated(a, b, torch.float32)
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
        assert torch.equal(native(left, right, dtype), products.emulated(left, right, dtype))
        exact = (
            a.clamp(-14, 14).to(torch.float8_e4m3fn).float()
            @ b.clamp(-14, 14).to(torch.float8_e4m3fn).float().t()
        )
        assert torch.equal(native(left, right, dtype), exact.to(dtype))


@pytest.mark.parametrize("kinds", [("rows", "tiles"), ("rows", "rows")])
def test_products_of_blocks_are_the_emulated_ones(kinds):
    """Scales are powers of two, so what differs is the order of a sum, and where sums are exact nothing does."""
    generator = torch.Generator().manual_seed(3)
    wide = [torch.randn(rows, 384, generator=generator) for rows in (256, 128)]
    wide = [one * torch.exp(3 * torch.randn(len(one), 1, generator=generator)) for one in wide]
    whole = [torch.randint(-7, 8, one.shape, generator=generator).float() for one in wide]
    for matrices, exact in ((wide, False), (whole, True)):
        emulated = [quantize(one, BLOCKS[kind]) for one, kind in zip(matrices, kinds, strict=True)]
        codes = [
            in_codes(one, torch.float8_e4m3fn, kind).plain for one, kind in zip(matrices, kinds, strict=True)
        ]
        for dtype in (torch.bfloat16, torch.float32):
            ours, theirs = products.native(*codes, dtype), products.emulated(*emulated, dtype)
            sizes = emulated[0].dequantized().abs() @ emulated[1].dequantized().abs().t()
            if exact:
                assert torch.equal(ours, theirs) and ours.any()
            elif dtype == torch.float32:
                assert ((ours - theirs).abs() <= 2e-6 * sizes).all() and not torch.equal(ours, theirs)
            else:
                near = (ours.float() - theirs.float()).abs() < 2e-6 * sizes  # where a sum is next to nothing
                assert int(ulps(ours, theirs)[~near].max()) <= 1


@pytest.mark.parametrize("kinds", [("rows", "tiles"), ("rows", "rows")])
def test_scales_of_blocks_lie_as_hopper_s_products_want_them(kinds):
    """Torch checks shapes and strides of what is asked for on a GPU also where there is none."""
    with FakeTensorMode():
        codes = [
            in_codes(torch.empty(rows, 640, device="cuda"), torch.float8_e4m3fn, kind).plain
            for rows, kind in zip((256, 384), kinds, strict=True)
        ]
        out = products.on_hopper(*codes, torch.float32)
        assert out.shape == (256, 384) and out.dtype == torch.float32
        other = in_codes(torch.empty(256, 512, device="cuda"), torch.float8_e4m3fn, kinds[0]).plain
        short = codes[0]._replace(inverse=other.inverse)
        with pytest.raises((RuntimeError, ValueError), match="scale"):
            products.on_hopper(short, codes[1], torch.float32)


@pytest.mark.parametrize(("rows", "filled"), [(384, 4), (512, 4), (640, 8)])
def test_scales_of_a_transposed_weight_do_too(rows, filled):
    weight = torch.randn(rows, 384)
    turned = in_codes(weight, torch.float8_e4m3fn, "tiles", plain=False, turned=True).turned
    scales = products.laid_out(turned)
    assert scales.stride() == (1, filled)
    assert torch.equal(scales[: rows // 128], turned.inverse.t()) and not scales[rows // 128 :].any()
