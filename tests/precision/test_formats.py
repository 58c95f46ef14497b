"""Formats against torch's dtypes and ml_dtypes': every number, every tie, and the neighbours of both."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.precision import formats
from megatron_davinci.precision.formats import E2M1, E2M3, E3M2, E4M3, E5M2, Format, parse, round_to
from tests.cases import cases

THEIRS = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
}
SMALL = [E4M3, E5M2, E3M2, E2M3, E2M1]


def every_case(form: Format) -> torch.Tensor:
    """All numbers, all midpoints, the fp32 numbers beside each, and what lies beyond, with both signs."""
    numbers = formats.numbers(form).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    top = torch.tensor(
        [form.top * 1.01, form.top * 2, 3e38, form.smallest / 4, 1e-40, 0.0], dtype=torch.float64
    )
    points = torch.cat([numbers, middles, top]).float()
    infinity = torch.tensor(float("inf"))
    beside = torch.cat([torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    both = torch.cat([points, beside])
    both = both[both.isfinite()]
    return torch.cat([both, -both])


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form.name)
def test_every_number_and_every_tie_is_rounded_as_ml_dtypes_does(form):
    x = every_case(form)
    clamped = x.clamp(-form.top, form.top).numpy()
    theirs = clamped.astype(THEIRS[form.name])
    ours = round_to(x, form)
    assert np.array_equal(ours.numpy(), theirs.astype(np.float32))
    # Bits, with the sign of zero.
    assert np.array_equal(formats.encode(ours, form).numpy(), theirs.view(np.uint8))


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
def test_torch_rounds_alike(form):
    x = torch.cat(
        [every_case(form), torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()]
    )
    x = x[x.isfinite()].clamp(-form.top, form.top)
    assert torch.equal(round_to(x, form), x.to(form.dtype).float())
    assert torch.equal(formats.encode(round_to(x, form), form), x.to(form.dtype).view(torch.uint8))


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form.name)
def test_all_codes_are_there_and_go_back_and_forth(form):
    codes = torch.arange(2**form.bits, dtype=torch.int32).to(torch.uint8)
    theirs = torch.from_numpy(codes.numpy().view(THEIRS[form.name]).astype(np.float32))
    finite = theirs.isfinite()
    assert torch.equal(formats.decode(codes, form)[finite], theirs[finite])
    assert torch.equal(formats.encode(theirs[finite], form), codes[finite])
    assert formats.numbers(form).tolist() == sorted(set(theirs[finite & ~torch.signbit(theirs)].tolist()))
    assert theirs[finite].max() == form.top
    assert theirs[finite & (theirs > 0)].min() == form.smallest


def test_fp4_is_eight_sizes():
    assert formats.numbers(E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("form", [*SMALL, parse("E8M3"), parse("E7M7")], ids=lambda form: form.name)
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_what_is_beyond_is_the_largest_and_nan_stays(form, rounding):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38])
    ours = round_to(x, form, rounding)
    assert ours[0].isnan()
    assert ours[1:].tolist() == [form.top, -form.top, form.top]


@pytest.mark.parametrize("mantissa", [2, 3, 7, 10])
def test_with_fp32_s_exponent_it_is_fp32_of_fewer_bits(mantissa):
    form = parse(f"E8M{mantissa}")
    generator = torch.Generator().manual_seed(mantissa)
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() <= form.top)]
    if mantissa == 7:
        assert torch.equal(round_to(x, form), x.to(torch.bfloat16).float())
    left_out = 23 - mantissa
    cut = (x.view(torch.int32) >> left_out << left_out).view(torch.float32)
    assert torch.equal(round_to(x, form, "truncate"), cut)
    # The nearest is one of the two around, and no farther than the other.
    above = (cut.view(torch.int32) + (1 << left_out)).view(torch.float32)
    near = round_to(x, form).double()
    assert bool(((near == cut.double()) | (near == above.double().clamp(-form.top, form.top))).all())
    assert bool(((near - x).abs() <= (above.double() - x).abs()).all())


@pytest.mark.parametrize("form", [parse("E5M10"), parse("E7M7"), parse("E4M4")], ids=lambda form: form.name)
def test_a_format_in_general_is_ieee_s_of_those_widths(form):
    numpy_half = form.name == "E5M10"
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * form.smallest * 2**form.mantissa_bits
    x = torch.cat([x, x * 2**form.mantissa_bits, torch.tensor([form.top, form.smallest])])
    ours = round_to(x, form).double()
    if numpy_half:
        assert np.array_equal(ours.float().numpy(), x.numpy().astype(np.float16).astype(np.float32))
    exponent = torch.frexp(ours)[1].sub(1).clamp(min=form.least_exponent)
    units = torch.ldexp(ours, form.mantissa_bits - exponent)
    assert torch.equal(units, units.round())
    assert bool(
        ((ours - x).abs() <= torch.ldexp(torch.ones_like(ours), exponent - form.mantissa_bits - 1)).all()
    )


def test_powers_of_two_are_every_e8m0():
    codes = torch.arange(256).to(torch.uint8)
    theirs = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    ours = formats.decode_e8m0(codes)
    assert torch.equal(ours[:255], theirs[:255]) and ours[255].isnan() and theirs[255].isnan()
    assert torch.equal(ours[:255], codes.view(torch.float8_e8m0fnu).float()[:255])
    assert torch.equal(formats.encode_e8m0(ours), codes)
    up = formats.power_of_two_above
    assert torch.equal(up(ours[:255]), ours[:255])
    normal = ours[1:254]
    infinity = torch.tensor(float("inf"))
    assert torch.equal(up(torch.nextafter(normal, infinity)), ours[2:255])
    assert torch.equal(up(torch.nextafter(ours[2:255], -infinity)), ours[2:255])
    assert up(torch.tensor(0.0)) == 2.0**-127
    assert up(torch.tensor([float("inf"), float("nan")])).isnan().all()


@pytest.mark.parametrize("name", ["E4M24", "E1M2", "E9M2", "fp8", "E4M0", "e4m3"])
def test_what_is_no_format_is_said(name):
    with pytest.raises(ValueError, match="no format"):
        parse(name)


@cases(30)
@given(
    st.integers(2, 8), st.integers(1, 10), st.integers(0, 2**32 - 1), st.sampled_from(["nearest", "truncate"])
)
def test_rounding_is_idempotent_monotone_and_odd(exponent, mantissa, seed, rounding):
    form = parse(f"E{exponent}M{mantissa}")
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * min(form.top, 1e30) ** 0.5
    x = x.sort().values
    ours = round_to(x, form, rounding)
    assert torch.equal(round_to(ours, form, rounding), ours)
    assert bool((ours.diff() >= 0).all())
    assert torch.equal(round_to(-x, form, rounding), -ours)
    assert ours.abs().max() <= form.top
    if rounding == "truncate":
        assert bool((ours.abs() <= x.abs()).all())
