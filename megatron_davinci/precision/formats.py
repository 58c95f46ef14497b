"""Floating-point formats of few bits: what they can say, and how a number is rounded to them.

E4M3 and E5M2: Micikevicius et al., 2022, FP8 Formats for Deep Learning, arXiv 2209.05433. E3M2, E2M3, E2M1 and the
scale E8M0: Rouhani et al., 2023, OCP Microscaling Formats (MX) Specification 1.0. Any other ExMy is a format as IEEE
754 has them, of those widths; with 8 bits of exponent it is what fp32 becomes when mantissa bits are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "truncate"]
"""`nearest`: to the nearest, ties to even. `truncate`: towards zero. `stochastic`: to either neighbour, with the
probability that makes the mean right."""

_EXPONENT_FIELD = 0x7F800000


@dataclass(frozen=True)
class Format:
    """A sign, an exponent and a mantissa, with subnormal numbers.

    Attributes:
        name: As it is written: `E4M3`.
        exponent_bits: Width of the exponent.
        mantissa_bits: Width of the mantissa, without the leading 1.
        top: The largest number.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    top: float

    @property
    def least_exponent(self) -> int:
        """Of the normal numbers: the smallest is 2 to it."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def smallest(self) -> float:
        """The smallest number above 0, a subnormal one."""
        return 2.0 ** (self.least_exponent - self.mantissa_bits)

    @property
    def bits(self) -> int:
        """Of a number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def dtype(self) -> torch.dtype | None:
        """Torch's own, where it has the format in one byte."""
        return {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}.get(self.name)


E4M3 = Format("E4M3", 4, 3, 448.0)
E5M2 = Format("E5M2", 5, 2, 57344.0)
E3M2 = Format("E3M2", 3, 2, 28.0)
E2M3 = Format("E2M3", 2, 3, 7.5)
E2M1 = Format("E2M1", 2, 1, 6.0)

_NAMED = {one.name: one for one in (E4M3, E5M2, E3M2, E2M3, E2M1)}


@lru_cache
def parse(name: str) -> Format:
    """A format by its name: `E4M3`, `E8M3`, `E7M7`.

    Raises:
        ValueError: It is none: 2 to 8 bits of exponent and 1 to 23 of mantissa are.
    """
    if name in _NAMED:
        return _NAMED[name]
    found = re.fullmatch(r"E([2-8])M(\d{1,2})", name)
    if found is None or not 1 <= int(found[2]) <= 23:
        raise ValueError(
            f"{name} is no format: ExMy with 2 to 8 bits of exponent and 1 to 23 of mantissa, as E4M3 or E8M3"
        )
    exponent, mantissa = int(found[1]), int(found[2])
    top = (2 - 2.0**-mantissa) * 2.0 ** (2 ** (exponent - 1) - 1)
    return Format(name, exponent, mantissa, top)


def round_to(x: Tensor, form: Format, rounding: Rounding = "nearest", noise: Tensor | None = None) -> Tensor:
    """The number of a format for each number. What is beyond the largest becomes the largest, NaN stays NaN.

    Args:
        x: fp32, any shape.
        form: The format.
        rounding: How.
        noise: For `stochastic`: uniform in [0, 1), of the shape of `x`.

    Returns:
        fp32: the same shape.
    """
    if form.exponent_bits == 8:
        return _round_mantissa(x, form, rounding, noise)
    # The power of two at or below |x| is x without sign and mantissa.
    step = (x.contiguous().view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
    step = step.clamp_(2.0**form.least_exponent, 2.0**127).mul_(2.0**-form.mantissa_bits)
    scaled = x / step
    if rounding == "nearest":
        scaled.round_()
    elif rounding == "truncate":
        scaled.trunc_()
    else:
        assert noise is not None, "stochastic rounding wants noise"
        below = scaled.floor()
        # The difference is exact, so the probability is, down to the noise's own steps of 2^-24.
        scaled = below.add_(noise < scaled.sub_(below))
    return scaled.mul_(step).clamp_(-form.top, form.top)


def _round_mantissa(x: Tensor, form: Format, rounding: Rounding, noise: Tensor | None) -> Tensor:
    """With fp32's exponent, rounding is whole-number arithmetic on bits, of subnormal numbers too."""
    left_out = 23 - form.mantissa_bits
    if not left_out:
        return x
    bits = x.contiguous().view(torch.int32)
    whole = -(1 << left_out)
    if rounding == "nearest":
        odd = (bits >> left_out) & 1
        bits = (bits + odd).add_((1 << (left_out - 1)) - 1)
    elif rounding == "stochastic":
        assert noise is not None, "stochastic rounding wants noise"
        bits = bits + noise.mul(1 << left_out).to(torch.int32)
    rounded = (bits & whole).view(torch.float32).clamp_(-form.top, form.top)
    return torch.where(x.isnan(), x, rounded)


def encode(values: Tensor, form: Format) -> Tensor:
    """The bits of numbers of a format with at most 8 of them.

    Args:
        values: fp32 numbers that the format has, none of them NaN.
        form: The format.

    Returns:
        uint8 of the same shape; unused high bits are 0.
    """
    assert form.bits <= 8, f"{form.name} has {form.bits} bits"
    size = values.abs()
    exponent = (torch.frexp(size)[1] - 1).masked_fill_(size == 0, form.least_exponent)
    exponent.clamp_(min=form.least_exponent)
    units = torch.ldexp(size, form.mantissa_bits - exponent).to(torch.int32)
    # A subnormal number has the exponent field 0 and no leading 1; the next exponent adds its leading 1 to the field.
    code = ((exponent - form.least_exponent) << form.mantissa_bits) + units
    return (code + (torch.signbit(values).to(torch.int32) << (form.bits - 1))).to(torch.uint8)


def decode(codes: Tensor, form: Format) -> Tensor:
    """The numbers that bits stand for: the other way round than `encode`.

    Args:
        codes: uint8 of finite numbers.
        form: The format.
    """
    code = codes.to(torch.int32)
    size = code & (2 ** (form.bits - 1) - 1)
    field, units = size >> form.mantissa_bits, size & (2**form.mantissa_bits - 1)
    units = units + ((field > 0).to(torch.int32) << form.mantissa_bits)
    exponent = field.clamp(min=1) - 1 + form.least_exponent - form.mantissa_bits
    magnitude = torch.ldexp(units.float(), exponent)
    return torch.where((code >> (form.bits - 1)) > 0, -magnitude, magnitude)


def numbers(form: Format) -> Tensor:
    """All finite numbers of a format of at most 8 bits that are not negative, in their order: fp32."""
    codes = torch.arange(2 ** (form.bits - 1), dtype=torch.uint8)
    every = decode(codes, form)
    return every[every <= form.top]


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is not less: a scale in E8M0, from 2^-127 to 2^127.

    Rounding up keeps the largest of a block within the format (Mishra et al., 2025, arXiv 2506.08027, section 3).

    Args:
        x: fp32, not negative.

    Returns:
        fp32; NaN where `x` is infinite or NaN.
    """
    fraction, exponent = torch.frexp(x)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp_(-127, 127)
    power = torch.ldexp(torch.ones_like(x), exponent).masked_fill(x == 0, 2.0**-127)
    return power.masked_fill(~x.isfinite(), float("nan"))


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two that is not more, from 2^-126 to 2^126, so that its inverse is a normal number too.

    Args:
        x: fp32, above 0.
    """
    exponent = (torch.frexp(x)[1] - 1).clamp_(-126, 126)
    return torch.ldexp(torch.ones_like(x), exponent)


def encode_e8m0(powers: Tensor) -> Tensor:
    """The bits of powers of two from 2^-127 to 2^127; of NaN 255.

    Args:
        powers: fp32.

    Returns:
        uint8.
    """
    code = (torch.frexp(powers)[1] - 1 + 127).masked_fill(powers.isnan(), 255)
    return code.to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """The powers of two that bits stand for: the other way round than `encode_e8m0`.

    Args:
        codes: uint8.
    """
    power = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.to(torch.int32) - 127)
    return power.masked_fill(codes == 255, float("nan"))
