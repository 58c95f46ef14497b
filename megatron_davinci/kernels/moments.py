"""Moments of Adam in 8 bits, in plain torch: what `csrc/kernels/moments.h` says and does.

An E4M3 code a number, and for each group of 128 its range: the largest and the smallest size in it, fp32. The code
stands for `448 (|x| / top)^k` with the k that takes the smallest to 2^-9, E4M3's own smallest (after COAT, Xi et al.,
2025, arXiv 2410.19313, section 4.1, whose k is a multiple of 1/16). Both ends come back exactly. So what is decoded
and encoded again has the same codes and ranges, and a checkpoint may hold numbers in place of codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 128
"""Numbers that have a range together."""

LEAST_TOP = 2.0**-120
"""A group in which nothing is as large is all zeros."""

SMALLEST = 2.0**-126
FIRST_DEPTH = 2.0**-32
"""Of a group's largest first moment: those below become zero."""

SECOND_DEPTH = 2.0**-64
"""Of a group's largest second moment: smaller ones that are not zero are raised to it, since too small a root of it
would make a step too large."""

_LOG2_TOP = math.log2(448)
_LOG2_RANGE = math.log2(448 * 2**9)
_TOP_CODE, _BOTTOM_CODE = 126, 1


def groups(count: int) -> int:
    """How many groups so many numbers have; the last one may be short."""
    return -(-count // GROUP)


def encode(values: Tensor, *, second: bool) -> tuple[Tensor, Tensor]:
    """Put moments into 8 bits.

    Args:
        values: [n] fp32.
        second: Whether they are second moments, none of which is negative.

    Returns:
        [n] uint8 codes, and [groups, 2] fp32 ranges: top and bottom, both no number where one of the group is none or
        infinite.
    """
    count = values.numel()
    x = torch.nn.functional.pad(values.detach().float(), (0, -count % GROUP)).view(-1, GROUP)
    size = x.abs()
    top = size.amax(1, keepdim=True)  # no number where one is
    empty = top < LEAST_TOP
    floor = (top * (SECOND_DEPTH if second else FIRST_DEPTH)).clamp(min=SMALLEST)
    counts = size > 0 if second else size >= floor
    bottom = torch.where(counts, size, math.inf).amin(1, keepdim=True)
    if second:
        bottom = torch.maximum(bottom, floor)
    bottom = torch.minimum(bottom, top / 2)
    bad = ~top.isfinite()
    top = top.masked_fill(bad, math.nan).masked_fill(empty, 0)
    bottom = bottom.masked_fill(bad, math.nan).masked_fill(empty, 0)
    if second:
        size = torch.where(size > 0, torch.maximum(size, bottom), 0)
    else:
        size = size.masked_fill(size < bottom, 0)
    power = _LOG2_RANGE / (top / bottom).log2()
    stretched = torch.exp2((size / top).log2() * power + _LOG2_TOP).masked_fill(empty, 0)
    codes = torch.copysign(stretched, x).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.view(-1)[:count], torch.cat([top, bottom], 1)


def decode(codes: Tensor, ranges: Tensor) -> Tensor:
    """The numbers.

    Args:
        codes: [n] uint8.
        ranges: [groups, 2] fp32.

    Returns:
        [n] fp32.
    """
    count = codes.numel()
    padded = torch.nn.functional.pad(codes, (0, -count % GROUP)).view(-1, GROUP)
    top, bottom = ranges.split(1, 1)
    stored = padded.view(torch.float8_e4m3fn).float()
    slope = (top / bottom).log2() / _LOG2_RANGE
    size = top * torch.exp2((stored.abs().log2() - _LOG2_TOP) * slope)
    code = padded & 127
    size = torch.where(code == _TOP_CODE, top, size)
    size = torch.where(code == _BOTTOM_CODE, bottom, size)
    size = torch.where(code == 0, 0.0, size)
    return torch.copysign(size, stored).view(-1)[:count]
