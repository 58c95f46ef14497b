"""What trials of kernels share: fresh random cases, and errors in units of the rounding that explains them.

A bound is made of roundings: so many of fp32 (half an ulp, `U`) along the way from an input to an output, each as
large as the number that is rounded, and one of the output's dtype. Error over bound is then at most 1, unless
something is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

U = 2.0**-24
ROUNDING = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
TINY = 2.0**-126  # below, floats have fewer bits


@dataclass
class Worst:
    """The largest error over bound of what was compared, and of what."""

    ratio: float = 0.0
    what: str = ""
    compared: int = field(default=0)

    def see(self, what: str, found: Tensor, exact: Tensor, bound: Tensor) -> None:
        """Compare; what is no number must be none on both sides, and an infinity the same one."""
        found, exact = found.double(), exact.double()
        finite = exact.isfinite()
        bad = torch.where(finite, ~found.isfinite(), ~(found.isnan() & exact.isnan()) & (found != exact))
        error = torch.where(finite & ~bad, (found - exact).abs() / (bound + TINY), 0.0)
        # A bound that is no number bounds nothing.
        unbounded = bool(bad.any() or error.isnan().any())
        ratio = math.inf if unbounded else (float(error.max()) if error.numel() else 0.0)
        self.compared += found.numel()
        if ratio > self.ratio:
            self.ratio, self.what = ratio, what


def integers(generator: torch.Generator, low: int, high: int) -> int:
    """One of low to high."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def size(generator: torch.Generator, high: int) -> int:
    """1 to high, small ones as often as large ones."""
    return max(1, int(high ** float(torch.rand((), generator=generator))))


def chance(generator: torch.Generator, probability: float) -> bool:
    """True with a probability."""
    return bool(torch.rand((), generator=generator) < probability)


def placed(values: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    """The same values at a random address: rows need not begin where 16 bytes do."""
    offset = integers(generator, 0, 7)
    room = torch.empty(values.numel() + offset, dtype=values.dtype, device=device)
    made = room.new_empty(0)  # not a view, which autograd would treat otherwise
    made.set_(room.untyped_storage(), offset, values.shape, values.contiguous().stride())
    return made.copy_(values)


class Into(torch.autograd.Function):
    """A copy in a given place: what a product makes, which is no leaf, at an address of the test's choice."""

    @staticmethod
    def forward(ctx, tensor, place):
        """Copy."""
        ctx.mark_dirty(place)
        return place.copy_(tensor)

    @staticmethod
    def backward(ctx, gradient):
        """That of the copy."""
        return gradient.clone(), None
