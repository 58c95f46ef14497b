"""A weight's gradient, added to an fp32 sum by the product that makes it: what Megatron-Core wants apex for.

The first product after Megatron-Core has set its sums to zero need not read them. A sum that is known to be zero says
so itself, by an attribute of the tensor `main_grad`: set as the buffer is cleared, gone as soon as anything is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ZERO = "davinci_is_zero"


def know_zeroed(chunk: Any) -> None:
    """Have the sums of a model chunk known to be zero from its `zero_grad_buffer` on, until something is added.

    Not where Megatron-Core captures CUDA graphs, since what is replayed asks nobody; and not beside apex's extension,
    which adds without a word.

    Args:
        chunk: Megatron-Core's `DistributedDataParallel`.
    """
    from megatron.core.tensor_parallel import layers

    extension = getattr(layers, "fused_weight_gradient_mlp_cuda", None)
    ours = getattr(extension, "wgrad_gemm_accum_fp32", None) is add_weight_gradient
    if not ours or getattr(chunk.config, "cuda_graph_impl", "none") != "none":
        return
    clear = chunk.zero_grad_buffer

    def cleared() -> None:
        clear()
        for parameter in chunk.params_with_grad:
            mark_zero(parameter.main_grad)

    chunk.zero_grad_buffer = cleared
    for parameter in chunk.params_with_grad:
        # What autograd brings itself, Megatron-Core adds at the end of each backward pass.
        parameter.register_post_accumulate_grad_hook(_added_to)


def _added_to(parameter: Any) -> None:
    take_zero(parameter.main_grad)


def mark_zero(total: Tensor) -> None:
    """Say of a sum that there is nothing in it."""
    setattr(total, _ZERO, True)


def take_zero(total: Tensor) -> bool:
    """Whether a sum is known to be zero; from now on it is not, and whoever asks must write all of it."""
    if not getattr(total, _ZERO, False):
        return False
    setattr(total, _ZERO, False)
    return True


def add_weight_gradient(inputs: Tensor, by_out: Tensor, total: Tensor) -> None:
    """Add `by_out.t() @ inputs`; no gradient in bf16 is made between.

    Args:
        inputs: [rows, in] bf16 or fp32.
        by_out: [rows, out] of the same dtype.
        total: [out, in] fp32, which is added to, or written where it is known to be zero.
    """
    with torch.no_grad():
        fused = by_out.device.type == "cuda" and by_out.dtype != total.dtype
        if not fused:
            by_out, inputs = by_out.to(total.dtype), inputs.to(total.dtype)
        first = take_zero(total)
        if fused and first:
            # bf16 products, written or added to fp32 in the same kernel.
            torch.ops.aten.mm.dtype_out(by_out.t(), inputs, torch.float32, out=total)
        elif fused:
            torch.ops.aten.addmm.dtype_out(total, by_out.t(), inputs, torch.float32, out=total)
        elif first:
            torch.mm(by_out.t(), inputs, out=total)
        else:
            total.addmm_(by_out.t(), inputs)
