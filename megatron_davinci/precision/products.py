"""Products of quantised matrices: by torch's own kernels for FP8, or emulated in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_davinci.precision.scaling import Quantized


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


def native(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """The same by `torch._scaled_mm`, which takes FP8 with a scale a tensor.

    Args:
        a: [m, k] in E4M3 or E5M2.
        b: [n, k] in E4M3 or E5M2, not both in E5M2.
        dtype: bf16 or fp32.

    Returns:
        [m, n].
    """
    left, right = (_codes(one) for one in (a, b))
    return torch._scaled_mm(
        left, right.t(), scale_a=a.inverse, scale_b=b.inverse, out_dtype=dtype, use_fast_accum=False
    )


def _codes(one: Quantized) -> Tensor:
    assert one.dtype is not None, "torch multiplies E4M3 and E5M2 only"
    return one.values.to(one.dtype)
