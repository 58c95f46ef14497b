"""Scales: what brings a tensor, or each block of it, into the range of a format, and what of it is lost there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_davinci.precision import formats, hadamard
from megatron_davinci.precision.formats import Format, Rounding

Blocks = Literal["tensor", "row", "tile"]
"""What has a scale: the tensor; `block` neighbours of a row; `block` x `block` of a matrix."""

Scale = Literal["none", "fp32", "power_of_two", "e8m0", "e4m3"]
"""`fp32`: the format's largest number, or 2^32 where that is less, over the block's. `power_of_two`: the one below
that. `e8m0`: the same of MX, whose inverse is rounded up to a power of two. `e4m3`: of NVFP4: E4M3 a block under one
fp32 number for the tensor."""

_LARGEST = torch.finfo(torch.float32).max
_HIGHEST = 2.0**32
"""That scales bring numbers to: fp32 holds sums of products of two such, but none of the largest that 7 or 8 bits of
exponent say."""


@dataclass(frozen=True)
class Quantizer:
    """How a matrix is put into a format. Blocks of rows lie along the dimension that a product sums over: the last.

    Attributes:
        form: The format.
        blocks: What has a scale.
        block: Neighbours that have one; without meaning for a tensor.
        scale: What a scale is.
        rounding: How numbers are rounded.
        hadamard: Seed of the random Hadamard transform before; None for none.
    """

    form: Format
    blocks: Blocks = "tensor"
    block: int = 0
    scale: Scale = "fp32"
    rounding: Rounding = "nearest"
    hadamard: int | None = None

    @property
    def transposes(self) -> bool:
        """Whether the transposed matrix has the same numbers, so that one quantised matrix serves both ways."""
        return self.blocks != "row" and self.hadamard is None


@dataclass(frozen=True)
class Lost:
    """What rounding lost, as numbers on the device.

    Attributes:
        underflow: Part of the numbers that became 0 and were not.
        overflow: Part that was beyond the format's largest number.
        scale: The tensor's scale; of blocks the smallest above 0, infinite where there is none.
    """

    underflow: Tensor
    overflow: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Quantized:
    """A matrix in a format.

    Attributes:
        values: [rows, columns] fp32: numbers of the format.
        inverse: What they are multiplied by to be the matrix again; its shape spreads over `blocked`.
        blocked: The shape in which blocks have dimensions of their own.
        amax: The largest size in the matrix: one number. Of a transformed matrix, after the transform.
        dtype: Torch's, of the format; None where it has none of one byte.
        lost: What was lost; None unless asked for.
    """

    values: Tensor
    inverse: Tensor
    blocked: tuple[int, ...]
    amax: Tensor
    dtype: torch.dtype | None = None
    lost: Lost | None = None

    def t(self) -> Quantized:
        """Transposed; for what has one scale, or tiles."""
        assert len(self.blocked) != 3, "blocks of a row are not those of the transposed matrix"
        inverse = self.inverse if self.inverse.dim() == 0 else self.inverse.permute(2, 3, 0, 1)
        blocked = (*self.blocked[2:], *self.blocked[:2]) if len(self.blocked) == 4 else self.blocked[::-1]
        return replace(self, values=self.values.t().contiguous(), inverse=inverse, blocked=blocked)

    def dequantized(self) -> Tensor:
        """[rows, columns] fp32: what the format kept. Of a transformed matrix, still transformed."""
        return (self.values.view(self.blocked) * self.inverse).view(self.values.shape)


def quantize(
    x: Tensor,
    how: Quantizer,
    *,
    amax: Tensor | None = None,
    largest: Callable[[Tensor], Tensor] | None = None,
    noise: Tensor | None = None,
    watch: bool = False,
) -> Quantized:
    """Put a matrix into a format.

    Args:
        x: [rows, columns] fp32.
        how: The format, the scales, the rounding.
        amax: What a tensor's scale is made of; None for its own largest number.
        largest: Makes of a rank's largest number that of all ranks that hold a part; None where there is one.
        noise: [rows, columns] uniform in [0, 1), for stochastic rounding.
        watch: Whether to count what is lost.

    Raises:
        ValueError: Blocks do not divide the matrix.
    """
    if how.hadamard is not None:
        x = hadamard.transform(x, how.hadamard)
    blocked, over = _blocked(x, how)
    seen = x.view(blocked)
    of_blocks = _amax(seen, over)
    own = of_blocks if not over else of_blocks.amax() if x.numel() else x.new_zeros(())
    own = own if largest is None else largest(own)
    if how.scale == "none":
        scale, inverse = torch.ones_like(own), torch.ones_like(own)
    elif how.blocks == "tensor":
        scale, inverse = _plain(own if amax is None else amax, how)
    elif how.scale == "e4m3":
        scale, inverse = _two_levels(of_blocks, own, how.form)
    else:
        scale, inverse = _plain(of_blocks, how)
    scaled = x if how.scale == "none" else (seen * scale).view(x.shape)
    values = formats.round_to(scaled, how.form, how.rounding, noise)
    lost = _lost(x, scaled, values, how.form, scale) if watch else None
    return Quantized(values, inverse, blocked, own, how.form.dtype, lost)


def _blocked(x: Tensor, how: Quantizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape in which blocks have dimensions, and which dimensions those are."""
    rows, columns = x.shape
    if how.blocks == "tensor":
        return (rows, columns), ()
    across = how.block if how.blocks == "tile" else 1
    if columns % how.block or rows % across:
        kind = f"{across} x {how.block}"
        raise ValueError(f"a matrix of {rows} x {columns} is not of whole blocks of {kind}")
    if how.blocks == "row":
        return (rows, columns // how.block, how.block), (2,)
    return (rows // across, across, columns // how.block, how.block), (1, 3)


def _amax(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """The largest size, of blocks with their dimensions kept: an infinite or NaN number shows in it."""
    if not over:
        if not x.numel():
            return x.new_zeros(())
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high)
    return torch.maximum(x.amax(over, keepdim=True), -x.amin(over, keepdim=True))


def _plain(amax: Tensor, how: Quantizer) -> tuple[Tensor, Tensor]:
    """The scales of one level and their inverses."""
    if how.scale == "e8m0":
        inverse = formats.power_of_two_above(amax / how.form.top)
        return 1 / inverse, inverse
    scale = _over(min(how.form.top, _HIGHEST), amax)
    scale = torch.where(amax > 0, scale, 1.0)
    if how.scale == "power_of_two":
        scale = formats.power_of_two_below(scale)
    # No number and no end of numbers have no scale: what is made with it is NaN, and seen as that.
    scale = torch.where(amax.isfinite(), scale, float("nan"))
    return scale, 1 / scale


def _two_levels(of_blocks: Tensor, amax: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """NVFP4's scales (arXiv 2509.25149, appendix B): E4M3 a block under fp32 for the tensor."""
    whole = torch.where(amax > 0, _over(form.top * formats.E4M3.top, amax), 1.0)
    whole = torch.where(amax.isfinite(), whole, float("nan"))
    stored = formats.round_to(of_blocks / form.top * whole, formats.E4M3)
    inverse = stored * (1 / whole)
    # A block whose scale is rounded to 0 is all zeros.
    return torch.where(inverse > 0, (1 / inverse).clamp_(max=_LARGEST), inverse), inverse


def _over(top: float, amax: Tensor) -> Tensor:
    """The quotient, rounded once; torch makes of `number / tensor` a product with the inverse."""
    return (torch.full_like(amax, top) / amax).clamp_(max=_LARGEST)


def _lost(x: Tensor, scaled: Tensor, values: Tensor, form: Format, scale: Tensor) -> Lost:
    return Lost(
        underflow=((values == 0) & (x != 0)).float().mean(),
        overflow=(scaled.abs() > form.top).float().mean(),
        scale=torch.where(scale > 0, scale, torch.inf).min(),
    )
