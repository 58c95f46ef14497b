"""A weight's gradient, added to an fp32 sum by the product that makes it: what Megatron-Core wants apex for."""

from __future__ import annotations

import torch
from torch import Tensor


def add_weight_gradient(inputs: Tensor, by_out: Tensor, total: Tensor) -> None:
    """Add `by_out.t() @ inputs`; no gradient in bf16 is made between.

    Args:
        inputs: [rows, in] bf16 or fp32.
        by_out: [rows, out] of the same dtype.
        total: [out, in] fp32, which is added to.
    """
    with torch.no_grad():
        if by_out.dtype == total.dtype:
            total.addmm_(by_out.t(), inputs)
        elif by_out.device.type == "cuda":
            # bf16 products, added to fp32 in the same kernel.
            torch.ops.aten.addmm.dtype_out(total, by_out.t(), inputs, torch.float32, out=total)
        else:
            total.addmm_(by_out.t().float(), inputs.float())
