"""Products of quantised matrices: by torch's own kernels for FP8, or emulated in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.kernels.quantize import BLOCK, Codes
from megatron_davinci.precision.scaling import Quantized

_STEP = 4  # blocks that cuBLAS reads the scales of 128 x 128 by


def emulated(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """`a bᵀ`, as hardware has it: numbers of the format are multiplied exactly and summed in fp32.

    Args:
        a: [m, k].
        b: [n, k].
        dtype: Of the result, which is rounded once.

    Returns:
        [m, n].
    """
    if a.inverse.dim() == 0 and b.inverse.dim() == 0:
        return (a.values @ b.values.t()).mul_(a.inverse * b.inverse).to(dtype)
    return (a.dequantized() @ b.dequantized().t()).to(dtype)


def native(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    """The same by torch's kernels for FP8, which take a scale a tensor, and on Hopper scales of blocks of 128.

    Args:
        a: [m, k] in E4M3 or E5M2.
        b: [n, k] in E4M3 or E5M2, not both in E5M2.
        dtype: bf16 or fp32.

    Returns:
        [m, n].
    """
    if a.scales == "tensor" and b.scales == "tensor":
        return _scaled(a.codes, b.codes, a.inverse, b.inverse, dtype)
    if a.codes.device.type == "cuda":
        return on_hopper(a, b, dtype)
    return _by_blocks(a, b, dtype)


def native_into(total: Tensor, a: Codes, b: Codes) -> None:
    """The same over what is there.

    Args:
        total: [m, n] fp32, contiguous, of which nothing is left.
        a: [m, k] as for `native`.
        b: [n, k] as for `native`.
    """
    if a.scales == "tensor" and b.scales == "tensor":
        _scaled(a.codes, b.codes, a.inverse, b.inverse, total.dtype, out=total)
    else:
        total.copy_(native(a, b, total.dtype))


def on_hopper(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    """A product by cuBLAS's kernels for scales of 1 x 128 and 128 x 128, of which one at most has those.

    Args:
        a: [m, k] in E4M3, of rows or tiles.
        b: [n, k] in E4M3, of rows or tiles.
        dtype: bf16 or fp32.

    Returns:
        [m, n].
    """
    kinds = {"rows": F.ScalingType.BlockWise1x128, "tiles": F.ScalingType.BlockWise128x128}
    product: Tensor = F.scaled_mm(
        a.codes,
        b.codes.t(),
        laid_out(a),
        kinds[a.scales],
        laid_out(b),
        kinds[b.scales],
        output_dtype=dtype,
    )
    return product


def shaped(out: Tensor, size: Sequence[int]) -> Tensor:
    """What an autograd function returns, in another shape: no view to autograd, which lets nobody overwrite one.

    Args:
        out: Made by the function, and held by nobody else.
        size: As for `view`.
    """
    result: Tensor = torch.ops.aten._unsafe_view(out, list(size))
    return result


def laid_out(one: Codes) -> Tensor:
    """Inverse scales as cuBLAS reads them: of rows [rows, k / 128], a column after the other; of tiles [k / 128,
    rows / 128], a column after the other, each filled up to a multiple of 4."""
    if one.scales == "rows":
        return one.inverse.t().contiguous().t()
    # Of a transposed matrix they lie transposed, and to fill up by nothing leaves them so.
    return F.pad(one.inverse, (0, -one.inverse.shape[1] % _STEP)).contiguous().t()


def _by_blocks(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    """A block of 128 of the sum at a time, in FP8; what comes of it is scaled and added up in fp32."""
    out = torch.zeros(a.codes.shape[0], b.codes.shape[0], device=a.codes.device)
    one = torch.ones((), device=out.device)
    left, right = (
        x.inverse.repeat_interleave(BLOCK, 0) if x.scales == "tiles" else x.inverse for x in (a, b)
    )
    for number, begin in enumerate(range(0, a.codes.shape[1], BLOCK)):
        here = [x.codes[:, begin : begin + BLOCK].contiguous() for x in (a, b)]
        part = _scaled(here[0], here[1], one, one, torch.float32)
        out += part.mul_(left[:, number, None]).mul_(right[:, number])
    return out.to(dtype)


def _scaled(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    into = {} if out is None else {"out": out}
    product: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=False, **into
    )
    return product
