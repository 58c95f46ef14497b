"""Matrices in FP8, as they are and transposed, in one pass: what products of few bits multiply.

Scales are a tensor's (Micikevicius et al., 2022, arXiv 2209.05433), of 128 neighbours in a row, or of 128 x 128
(DeepSeek-AI, 2024, arXiv 2412.19437, section 3.3.2). They are those of `precision.scaling`, to the bit: fp32 for a
tensor, powers of two for blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_davinci.kernels.operators import operator
from megatron_davinci.kernels.ways import Way, way_of

_OP = "quantize"
BLOCK = 128
"""Of what has a scale, where a tensor has more than one."""

Scales = Literal["tensor", "rows", "tiles"]
"""What has a scale: the tensor; each 128 neighbours of a row; each 128 x 128."""

_STEP = 16  # numbers that torch's products of FP8 want rows and columns in, and that kernels take at least
_MOST = torch.finfo(torch.float32).max
_TOP = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class Codes(NamedTuple):
    """A matrix in FP8.

    Attributes:
        codes: [rows, columns] float8.
        inverse: fp32, what they are multiplied by to be the matrix again: one number of a tensor; of rows
            [rows, columns / 128], a column after the other; of tiles [rows / 128, columns / 128].
        scales: What has a scale.
    """

    codes: Tensor
    inverse: Tensor
    scales: Scales


class Both(NamedTuple):
    """A matrix in FP8 as it is and transposed.

    Attributes:
        plain: As it is; None unless it was asked for.
        turned: The transposed matrix, with blocks along its own rows; None unless it was asked for.
        amax: The largest size of all numbers: one fp32 number, NaN where one is none.
    """

    plain: Codes | None
    turned: Codes | None
    amax: Tensor


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scales: Scales,
    *,
    plain: bool = True,
    turned: bool = False,
    known: Tensor | None = None,
) -> Both:
    """Put a matrix into FP8.

    Args:
        x: [rows, columns] bf16 or fp32.
        dtype: float8_e4m3fn or float8_e5m2.
        scales: What has a scale.
        plain: Whether the matrix is wanted as it is.
        turned: Whether it is wanted transposed.
        known: The largest number that a tensor's scale is made of: one fp32 number; None for its own.

    Raises:
        ValueError: It is no such matrix, blocks do not divide it, or blocks are given a largest number.
    """
    if dtype not in _TOP or x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{x.dtype} {list(x.shape)} in {dtype}: a matrix of bf16 or fp32 in FP8 is expected")
    if known is not None and scales != "tensor":
        raise ValueError("a largest number is known of a tensor; blocks have their own")
    wanted = {"columns": scales == "tiles" or (scales == "rows" and plain)}
    wanted["rows"] = scales == "tiles" or (scales == "rows" and turned)
    for name, size in zip(("rows", "columns"), x.shape, strict=True):
        if wanted[name] and size % BLOCK:
            raise ValueError(f"{size} {name} are not of whole blocks of {BLOCK}")
    x = x.contiguous()
    own = amax_of(x) if scales == "tensor" and known is None else None
    e5m2 = dtype == torch.float8_e5m2
    given = own if own is not None else known
    codes, back, inverse, inverse_back, seen = quantized(x, given, scales, e5m2, plain, turned)
    if scales == "rows":
        of_plain, of_turned = inverse.t(), inverse_back.t()
    else:
        of_plain, of_turned = inverse, inverse.t() if scales == "tiles" else inverse
    return Both(
        Codes(codes, of_plain, scales) if plain else None,
        Codes(back, of_turned, scales) if turned else None,
        seen if own is None else own,
    )


@operator("davinci::quantize_amax", mutates_args=(), schema="(Tensor x) -> Tensor")
def amax_of(x: Tensor) -> Tensor:
    """The largest size of all numbers.

    Args:
        x: Of any shape, bf16 or fp32, contiguous.

    Returns:
        One fp32 number; NaN where one is none, 0 where there are none.
    """
    way = way_of(_OP, x)
    if not way.has_kernels:
        return _amax(x)
    out = torch.zeros((), dtype=torch.float32, device=x.device)
    if x.numel():
        way.launch("quantize_amax", -(-x.numel() // (1 << 14)), x, x, out, x.numel())
    return out


@operator(
    "davinci::quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor? known, str scales, bool e5m2, bool plain, bool turned) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def quantized(
    x: Tensor, known: Tensor | None, scales: str, e5m2: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and inverse scales; what is not wanted is empty.

    Args:
        x: [rows, columns] bf16 or fp32, contiguous.
        known: Of a tensor: the number that its scale is made of.
        scales: `tensor`, `rows` or `tiles`.
        e5m2: Whether in E5M2, else in E4M3.
        plain: Whether the matrix is wanted as it is.
        turned: Whether it is wanted transposed.

    Returns:
        [rows, columns] and [columns, rows] float8; the inverse scales of both: of a tensor one number, of rows
        [columns / 128, rows] and [rows / 128, columns], of tiles [rows / 128, columns / 128], which both share; and
        the largest size of all numbers.
    """
    way = way_of(_OP, x)
    if way.has_kernels and (x.shape[0] % _STEP or x.shape[1] % _STEP or x.data_ptr() % 16):
        way = Way("rows or columns are not of whole 16s, or do not begin at 16 bytes")
    if not way.has_kernels:
        return _plain(x, known, scales, e5m2, plain, turned)
    made = _empty(x, scales, e5m2, plain, turned)
    codes, back, inverse, inverse_back, amax = made
    amax.zero_()
    rows, columns = x.shape
    blocks = -(-rows // BLOCK) * -(-columns // BLOCK)
    if x.numel():
        way.launch(
            f"quantize_{scales}",
            blocks,
            x,
            x,
            known if known is not None else 0,
            codes if plain else 0,
            back if turned else 0,
            inverse,
            inverse_back,
            amax,
            rows,
            columns,
            int(e5m2),
        )
    return made


@amax_of.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@quantized.register_fake
def _(
    x: Tensor, known: Tensor | None, scales: str, e5m2: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(x, scales, e5m2, plain, turned)


def _empty(
    x: Tensor, scales: str, e5m2: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    inverse: tuple[int, ...] = ()
    inverse_back: tuple[int, ...] = (0,)
    if scales == "tiles":
        inverse = (rows // BLOCK, columns // BLOCK)
    elif scales == "rows":
        inverse = (columns // BLOCK, rows) if plain else (0, 0)
        inverse_back = (rows // BLOCK, columns) if turned else (0, 0)
    form = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    return (
        x.new_empty((rows, columns) if plain else (0,), dtype=form),
        x.new_empty((columns, rows) if turned else (0,), dtype=form),
        x.new_empty(inverse, dtype=torch.float32),
        x.new_empty(inverse_back, dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


def _plain(
    x: Tensor, known: Tensor | None, scales: str, e5m2: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same composed of torch's operations, with torch's own rounding to FP8."""
    form = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    _, _, inverse, inverse_back, _ = made = list(_empty(x, scales, e5m2, plain, turned))
    made[4] = _amax(x)
    rows, columns = x.shape
    if scales == "rows":
        for place, wanted, matrix, of in ((0, plain, x, inverse), (1, turned, x.t(), inverse_back)):
            if wanted:
                blocks = matrix.contiguous().float().view(matrix.shape[0], -1, BLOCK)
                scale = _power_of_two(blocks.abs().amax(2), _TOP[form])
                made[place] = _rounded(blocks * scale.unsqueeze(2), form).view(matrix.shape)
                of.copy_((1 / scale).t())
        return tuple(made)  # type: ignore[return-value]
    if scales == "tiles":
        tiles = x.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = _power_of_two(tiles.abs().amax((1, 3)), _TOP[form])
        codes = _rounded(tiles * scale[:, None, :, None], form).view(x.shape)
    else:
        assert known is not None, "a tensor's scale is made of a number"
        scale = _scale(known.float(), _TOP[form])
        codes = _rounded(x.float() * scale, form)
    inverse.copy_(1 / scale)
    if plain:
        made[0] = codes
    if turned:
        made[1] = codes.t().contiguous()
    return tuple(made)  # type: ignore[return-value]


def _amax(x: Tensor) -> Tensor:
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def _rounded(scaled: Tensor, form: torch.dtype) -> Tensor:
    return scaled.clamp(-_TOP[form], _TOP[form]).to(form)


def _scale(amax: Tensor, top: float) -> Tensor:
    scale = torch.where(amax > 0, (torch.full_like(amax, top) / amax).clamp_(max=_MOST), 1.0)
    return torch.where(amax.isfinite(), scale, float("nan"))


def _power_of_two(amax: Tensor, top: float) -> Tensor:
    fraction, exponent = torch.frexp(_scale(amax, top))
    power = torch.ldexp(torch.ones_like(fraction), (exponent - 1).clamp_(max=126))
    return torch.where(amax.isfinite(), power, float("nan"))
