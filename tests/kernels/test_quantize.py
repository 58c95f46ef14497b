"""Matrices in FP8 and transposed: the codes and scales of `precision.scaling`, to the bit; and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kernel_trials
from megatron_davinci.kernels import quantize as ops
from megatron_davinci.kernels.made import Gated, GatedGradient, Normed, written
from megatron_davinci.kernels.quantize import amax_of, quantize
from megatron_davinci.kernels.rms_norm import forward, scale_of
from tests.cases import cases

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_codes_and_scales_are_those_of_emulation_to_the_bit(device):
    @cases(16)
    @given(st.integers(0, 2**31))
    def on_any_matrix(seed):
        worst = kernel_trials.TRIALS["quantize"](seed, device)
        assert worst.ratio == 0, worst

    on_any_matrix()


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_every_bf16_number_is_rounded_as_torch_rounds_it(device, form):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(torch.bfloat16).view(256, 256)
    top = torch.finfo(form).max
    found = quantize(x.to(device), form, "tensor", turned=True, known=torch.tensor(top, device=device))
    right = x.float().clamp(-top, top).to(form).float()
    for ours, theirs in ((found.plain, right), (found.turned, right.t())):
        ours = ours.codes.cpu().float()
        same = (ours == theirs) & (ours.signbit() == theirs.signbit()) | (ours.isnan() & theirs.isnan())
        assert same.all()
    assert found.amax.isnan()


def test_what_is_infinite_shows_in_its_block_and_in_no_other(device):
    x = torch.randn(128, 256)
    x[3, 200] = torch.inf
    found = quantize(x.to(device), E4M3, "rows", turned=True)
    assert found.amax.isinf()
    assert found.plain.inverse.isnan().nonzero().tolist() == [[3, 1]]
    assert found.turned.inverse.isnan().nonzero().tolist() == [[200, 0]]
    assert (
        int(found.plain.codes.float().isnan().sum()) == int(found.turned.codes.float().isnan().sum()) == 128
    )


def test_a_matrix_that_does_not_go_is_refused():
    x = torch.randn(48, 80)
    for arguments, message in (
        ((x, E4M3, "rows"), "80 columns are not of whole blocks of 128"),
        ((x, E4M3, "tiles"), "48 rows are not of whole blocks of 128"),
        ((x, torch.float16, "tensor"), "a matrix of bf16 or fp32 in FP8 is expected"),
        ((x[0], E4M3, "tensor"), "a matrix of bf16 or fp32 in FP8 is expected"),
        ((Gated(x), E4M3, "rows"), "40 columns are not of whole blocks of 128"),
        ((Gated(torch.randn(128, 256)), E4M3, "tiles"), "tiles are of weights, which are in memory"),
        ((GatedGradient(x, x[:, :40]), E4M3, "rows"), "has a scale a tensor"),
        ((GatedGradient(x, x), E4M3, "tensor"), "of a product is torch.float32 \\[48, 80\\] for rows of"),
        ((GatedGradient(x, x[:, :40].bfloat16()), E4M3, "tensor"), "of a product is torch.bfloat16"),
        ((Gated(x[:, :79]), E4M3, "tensor"), "are not of gates and as many that they gate"),
        ((Normed(x, x[0].bfloat16(), x[:, 0]), E4M3, "tensor"), "weight of a norm is torch.bfloat16"),
        ((Normed(x, x[0, :48], x[:, 0]), E4M3, "tensor"), "weight of a norm is torch.float32 \\[48\\]"),
        ((Normed(x, x[0], x[:, 0].double()), E4M3, "tensor"), "the scales of 48 rows are torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(*arguments)
    with pytest.raises(ValueError, match="blocks have their own"):
        quantize(torch.randn(128, 128), E4M3, "rows", known=torch.tensor(1.0))
    for name in ("known", "noted"):
        with pytest.raises(
            ValueError, match=f"{name} is torch.float64 \\[\\] on cpu: one number of torch.float32"
        ):
            quantize(x, E4M3, "tensor", **{name: torch.tensor(1.0, dtype=torch.float64)})


def test_rows_whose_scales_lie_apart_are_those_whose_scales_do_not(device):
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(device)
    scale, weight = scale_of(x, x[0], 1e-6), x[0].clone()
    apart = scale.repeat_interleave(2)[::2]
    the_same(*(quantize(Normed(x, weight, one), E4M3, "tensor", turned=True) for one in (apart, scale)))


def the_same(ours, theirs):
    """To the bit, as they are and transposed."""
    for one, other in ((ours.plain, theirs.plain), (ours.turned, theirs.turned)):
        assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert torch.equal(one.inverse, other.inverse) or (one.inverse.isnan() and other.inverse.isnan())
    assert torch.equal(ours.amax, theirs.amax) or (ours.amax.isnan() and theirs.amax.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_through_swiglu_goes_into_codes_as_if_it_had_been_written(device, dtype):
    # Whole tiles and parts of one, both ways; a width of 8 more than whole 16s; gates at which exp is 0 or infinite.
    for (rows, width), form in (((144, 136), E5M2), ((16, 8), E4M3), ((272, 264), E5M2)):
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, 2 * width, generator=g)
        x[:, :width] *= torch.exp(3 * torch.randn(rows, 1, generator=g))
        by = torch.randn(rows, width, generator=g) / 1000
        x[1, :4], x[2, :4] = (
            torch.tensor([-300.0, 300.0, -90.0, 90.0]),
            torch.tensor([0.0, -0.0, 1e38, -1e38]),
        )
        if rows == 144:
            x[3, 5], by[4, 6], by[5, 7] = torch.inf, -torch.inf, torch.nan
        matrix = GatedGradient(x.to(device, dtype), by.to(device, dtype))
        there, options = written(matrix), {"turned": True, "known": torch.tensor(2e-3, device=device)}
        the_same(quantize(matrix, form, "tensor", **options), quantize(there, form, "tensor", **options))
        del options["known"]
        the_same(quantize(matrix, form, "tensor", **options), quantize(there, form, "tensor", **options))


@pytest.mark.parametrize(
    ("scales", "made"),
    [("tensor", "norm"), ("rows", "swiglu"), ("tiles", "none"), ("tensor", "swiglu_gradient")],
)
def test_opcheck(device, scales, made):
    rows = torch.randn(128, 256 if made.startswith("swiglu") else 128, device=device)
    scale = torch.ones(128, device=device) if made == "norm" else None
    weight = torch.ones(128, device=device) if made == "norm" else None
    if made == "swiglu_gradient":
        weight = torch.randn(128, 128, device=device)
    known = torch.tensor(3.0, device=device) if scales == "tensor" else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.largest.made, (rows, scale, weight, made), test_utils=tests)
    torch.library.opcheck(
        ops.quantized.made,
        (rows, scale, weight, known, None, made, scales, False, scales != "rows", True),
        test_utils=tests,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_rows_are_those_of_normalising_them(device, dtype):
    for width in (32, 1024, 2048, 100):
        x, weight = (
            torch.randn(5, width, dtype=dtype, device=device),
            torch.ones(width, dtype=dtype, device=device),
        )
        assert torch.equal(scale_of(x, weight, 1e-6), forward(x, None, weight, 1e-6)[2])


def test_no_rows(device):
    found = quantize(torch.empty(0, 128, device=device), E4M3, "tensor", turned=True)
    assert found.plain.codes.shape == (0, 128) and found.turned.codes.shape == (128, 0) and found.amax == 0
    rows, by = torch.empty(0, 256, device=device), torch.empty(0, 128, device=device)
    found = quantize(GatedGradient(rows, by), E5M2, "tensor", turned=True)
    assert found.plain.codes.shape == (0, 256) and found.turned.codes.shape == (256, 0) and found.amax == 0
    found = quantize(torch.empty(0, 256, device=device), E4M3, "rows", turned=True)
    assert found.plain.inverse.shape == (0, 2) and found.turned.inverse.shape == (256, 0) and found.amax == 0


@pytest.mark.parametrize("scales", ["tensor", "rows"])
def test_the_largest_number_is_noted_where_one_is_given_and_never_becomes_smaller(device, scales):
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    known = amax_of(x) if scales == "tensor" else None
    free = quantize(x, torch.float8_e4m3fn, scales, turned=True, known=known)
    for before, after in ((0.0, float(free.amax)), (1e3, 1e3)):
        place = torch.full((3,), before, device=device)
        noting = quantize(x, torch.float8_e4m3fn, scales, turned=True, known=known, noted=place[1])
        assert place.tolist() == [before, after, before] and float(noting.amax) == after
        assert torch.equal(noting.plain.codes.view(torch.uint8), free.plain.codes.view(torch.uint8))
    x[3, 5] = float("nan")
    quantize(x, torch.float8_e4m3fn, scales, known=known, noted=place[1])
    assert place[1].isnan()
