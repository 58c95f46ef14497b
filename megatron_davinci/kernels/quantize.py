"""Matrices in FP8, as they are and transposed, in one pass: what products of few bits multiply.

Scales are a tensor's (Micikevicius et al., 2022, arXiv 2209.05433), of 128 neighbours in a row, or of 128 x 128
(DeepSeek-AI, 2024, arXiv 2412.19437, section 3.3.2). They are those of `precision.scaling`, to the bit: fp32 for a
tensor, powers of two for blocks. A matrix may be one that SwiGLU, its gradient or RMSNorm is to make: kernels make it
as they read, and it is never written (`kernels.made`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_davinci.kernels.made import Matrix, check, of_parts, parts, written
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
    x: Matrix,
    dtype: torch.dtype,
    scales: Scales,
    *,
    plain: bool = True,
    turned: bool = False,
    known: Tensor | None = None,
    noted: Tensor | None = None,
) -> Both:
    """Put a matrix into FP8.

    Args:
        x: [rows, columns] bf16 or fp32, in memory or to be made.
        dtype: float8_e4m3fn or float8_e5m2.
        scales: What has a scale.
        plain: Whether the matrix is wanted as it is.
        turned: Whether it is wanted transposed.
        known: The largest number that a tensor's scale is made of: one fp32 number; None for its own.
        noted: One fp32 number that becomes the largest size where that is larger, or none; the result's `amax` then.

    Raises:
        ValueError: It is no such matrix, or its parts do not go together; blocks do not divide it, or are given a
            largest number; or what is given as one is no fp32 number of the matrix's device.
    """
    made, rows, row_scale, beside = parts(x)
    if dtype not in _TOP or rows.dim() != 2 or rows.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{rows.dtype} {list(rows.shape)} in {dtype}: a matrix of bf16 or fp32 in FP8 is expected"
        )
    if made != "none" and scales == "tiles":
        raise ValueError("tiles are of weights, which are in memory")
    if made == "swiglu_gradient" and scales != "tensor":
        raise ValueError("a gradient that is to be made has a scale a tensor")
    check(x)
    for name, number in (("known", known), ("noted", noted)):
        if number is not None and (
            number.dtype != torch.float32 or number.shape or number.device != rows.device
        ):
            raise ValueError(
                f"{name} is {number.dtype} {list(number.shape)} on {number.device}: one number of torch.float32 on "
                f"{rows.device} is expected"
            )
    if known is not None and scales != "tensor":
        raise ValueError("a largest number is known of a tensor; blocks have their own")
    wanted = {"columns": scales == "tiles" or (scales == "rows" and plain)}
    wanted["rows"] = scales == "tiles" or (scales == "rows" and turned)
    for name, size in zip(("rows", "columns"), x.shape, strict=True):
        if wanted[name] and size % BLOCK:
            raise ValueError(f"{size} {name} are not of whole blocks of {BLOCK}")
    rows, row_scale = rows.contiguous(), None if row_scale is None else row_scale.contiguous()
    own = largest(rows, row_scale, beside, made) if scales == "tensor" and known is None else None
    e5m2 = dtype == torch.float8_e5m2
    given = own if own is not None else known
    codes, back, inverse, inverse_back, seen = quantized(
        rows, row_scale, beside, given, noted, made, scales, e5m2, plain, turned
    )
    if noted is not None:
        seen = noted
    if scales == "rows":
        of_plain, of_turned = inverse.t(), inverse_back.t()
    else:
        of_plain, of_turned = inverse, inverse.t() if scales == "tiles" else inverse
    return Both(
        Codes(codes, of_plain, scales) if plain else None,
        Codes(back, of_turned, scales) if turned else None,
        seen if own is None or noted is not None else own,
    )


def amax_of(x: Matrix) -> Tensor:
    """The largest size of all numbers.

    Args:
        x: [rows, columns] bf16 or fp32, contiguous.

    Returns:
        One fp32 number; NaN where one is none, 0 where there are none.
    """
    made, rows, row_scale, beside = parts(x)
    result: Tensor = largest(rows, row_scale, beside, made)
    return result


@operator(
    "davinci::quantize_amax",
    mutates_args=(),
    schema="(Tensor rows, Tensor? row_scale, Tensor? beside, str made) -> Tensor",
)
def largest(rows: Tensor, row_scale: Tensor | None, beside: Tensor | None, made: str) -> Tensor:
    """As `amax_of`, of the parts of a matrix."""
    matrix = of_parts(made, rows, row_scale, beside)
    way = _way(matrix, rows, beside)
    if not way.has_kernels and made == "none":
        way = way_of(_OP, rows)  # that rows begin anywhere does not matter here
    if not way.has_kernels:
        return _amax(written(matrix))
    out = torch.zeros((), dtype=torch.float32, device=rows.device)
    if not rows.numel():
        return out
    if made == "none":
        way.launch("quantize_amax", -(-rows.numel() // (1 << 14)), rows, rows, out, rows.numel())
    else:
        nothing = (0, 0, 0, 0, 0)  # no codes, and so no scale
        _launch(way, matrix, "tensor", *nothing, out, e5m2=False)
    return out


@operator(
    "davinci::quantize",
    mutates_args={"noted"},
    schema="(Tensor rows, Tensor? row_scale, Tensor? beside, Tensor? known, Tensor(a!)? noted, str made, str scales, "
    "bool e5m2, bool plain, bool turned) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def quantized(
    rows: Tensor,
    row_scale: Tensor | None,
    beside: Tensor | None,
    known: Tensor | None,
    noted: Tensor | None,
    made: str,
    scales: str,
    e5m2: bool,
    plain: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and inverse scales; what is not wanted is empty.

    Args:
        rows: What the matrix is made of, as `made.parts` says; contiguous.
        row_scale: The same.
        beside: The same.
        known: Of a tensor: the number that its scale is made of.
        noted: As `quantize`.
        made: The same: `none`, `swiglu`, `norm` or `swiglu_gradient`.
        scales: `tensor`, `rows` or `tiles`.
        e5m2: Whether in E5M2, else in E4M3.
        plain: Whether the matrix is wanted as it is.
        turned: Whether it is wanted transposed.

    Returns:
        [rows, columns] and [columns, rows] float8; the inverse scales of both: of a tensor one number, of rows
        [columns / 128, rows] and [rows / 128, columns], of tiles [rows / 128, columns / 128], which both share; and
        the largest size of all numbers, unless it is noted.
    """
    matrix = of_parts(made, rows, row_scale, beside)
    way = _way(matrix, rows, beside)
    result = _empty(rows, matrix.shape, scales, e5m2, plain, turned, noted=noted is not None)
    if not way.has_kernels:
        found = _plain(written(matrix), known, scales, e5m2, plain, turned)
        if noted is None:
            return found
        torch.maximum(noted, found[4], out=noted)
        return (*found[:4], result[4])
    codes, back, inverse, inverse_back, amax = result
    if noted is None:
        amax.zero_()
    if rows.numel():
        _launch(
            way,
            matrix,
            scales,
            known if known is not None else 0,
            codes if plain else 0,
            back if turned else 0,
            inverse,
            inverse_back,
            amax if noted is None else noted,
            e5m2=e5m2,
        )
    return result


def _way(matrix: Matrix, rows: Tensor, beside: Tensor | None) -> Way:
    """Kernels where there are some for these sizes and addresses."""
    way = way_of(_OP, rows) if beside is None else way_of(_OP, rows, beside)
    here = [rows.data_ptr(), 0 if beside is None else beside.data_ptr()]
    if way.has_kernels and (any(size % _STEP for size in matrix.shape) or any(at % 16 for at in here)):
        return Way("rows or columns are not of whole 16s, or do not begin at 16 bytes")
    return way


def _launch(way: Way, matrix: Matrix, scales: str, *places: Tensor | int, e5m2: bool) -> None:
    """`places`: the known largest number, codes, transposed ones, both inverse scales, and the largest size."""
    made, rows, *others = parts(matrix)
    of = [rows, *(one for one in others if one is not None)]
    down, across = matrix.shape
    if made == "swiglu_gradient":
        kernel, across = f"quantize_swiglu_gradient_{'e5m2' if e5m2 else 'e4m3'}", across // 2
        known, codes, back, inverse, _, amax = places
        sizes: tuple[Tensor | int, ...] = (known, codes, back, inverse, amax, down, across)
    else:
        kernel = f"quantize_{scales}" if made == "none" else f"quantize_{made}_{scales}"
        sizes = (*places, down, across, int(e5m2))
    way.launch(kernel, -(-down // BLOCK) * -(-across // BLOCK), rows, *of, *sizes)


@largest.register_fake
def _(rows: Tensor, row_scale: Tensor | None, beside: Tensor | None, made: str) -> Tensor:
    return rows.new_empty((), dtype=torch.float32)


@quantized.register_fake
def _(
    rows: Tensor,
    row_scale: Tensor | None,
    beside: Tensor | None,
    known: Tensor | None,
    noted: Tensor | None,
    made: str,
    scales: str,
    e5m2: bool,
    plain: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = of_parts(made, rows, row_scale, beside).shape
    return _empty(rows, size, scales, e5m2, plain, turned, noted=noted is not None)


def _empty(
    x: Tensor, size: Sequence[int], scales: str, e5m2: bool, plain: bool, turned: bool, *, noted: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = size
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
        x.new_empty((0,) if noted else (), dtype=torch.float32),
    )


def _plain(
    x: Tensor, known: Tensor | None, scales: str, e5m2: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same composed of torch's operations, with torch's own rounding to FP8."""
    form = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    _, _, inverse, inverse_back, _ = made = list(_empty(x, x.shape, scales, e5m2, plain, turned))
    made[4] = _amax(x)
    rows, columns = x.shape
    if scales == "rows":
        for place, wanted, matrix, of in ((0, plain, x, inverse), (1, turned, x.t(), inverse_back)):
            if wanted:
                blocks = matrix.contiguous().float().view(matrix.shape[0], matrix.shape[1] // BLOCK, BLOCK)
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
