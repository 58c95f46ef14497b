"""What is kept for the backward pass, kept in 8 bits: E4M3 with a power of two for each 16 neighbours.

After COAT (Xi et al., 2025, arXiv 2410.19313, section 5): inputs of layers that are not linear have small groups,
since one scale a tensor loses too much of them. 17/16 bytes a number in place of 2 or 4.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_davinci.precision import formats, scaling
from megatron_davinci.precision.formats import E4M3
from megatron_davinci.precision.scaling import Quantizer

GROUP = 16
BYTES = 1 + 1 / GROUP
"""Of a number."""

_HOW = Quantizer(E4M3, "row", GROUP, "e8m0")


class Packed(NamedTuple):
    """A tensor in 8 bits.

    Attributes:
        codes: Of its shape, float8_e4m3fn.
        scales: [numbers / 16] uint8, exponents in E8M0.
        dtype: What it was.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


def pack(x: Tensor) -> Packed:
    """Put a tensor into 8 bits.

    Args:
        x: [..., n] bf16 or fp32, n a multiple of 16.
    """
    quantized = scaling.quantize(x.detach().float().reshape(-1, x.shape[-1]), _HOW)
    codes = quantized.values.to(torch.float8_e4m3fn).view(x.shape)
    return Packed(codes, formats.encode_e8m0(quantized.inverse.flatten()), x.dtype)


def unpack(packed: Packed) -> Tensor:
    """The tensor, as far as 8 bits have kept it."""
    groups = packed.codes.float().view(-1, GROUP)
    whole = groups * formats.decode_e8m0(packed.scales).unsqueeze(1)
    return whole.view(packed.codes.shape).to(packed.dtype)


def kept_in_8_bits() -> AbstractContextManager[Any]:
    """A context in which autograd keeps activations in 8 bits; weights, statistics and codes stay as they are."""
    return torch.autograd.graph.saved_tensors_hooks(_keep, _take)


def keeping(forward: Callable[..., Any], when: Callable[[], bool]) -> Callable[..., Any]:
    """A module's `forward` in that context.

    Args:
        forward: What is wrapped.
        when: Asked at each call, whether to.
    """

    def kept(*arguments: Any, **options: Any) -> Any:
        if not when():
            return forward(*arguments, **options)
        with kept_in_8_bits():
            return forward(*arguments, **options)

    return kept


def _keep(x: Tensor) -> Tensor | Packed:
    # No weight, though a leaf: what a layer is given by another pipeline stage, or as it is computed again.
    weight = isinstance(x, torch.nn.Parameter)
    if weight or x.dtype not in (torch.bfloat16, torch.float32) or x.dim() < 2 or x.shape[-1] % GROUP:
        return x
    return pack(x)


def _take(kept: Tensor | Packed) -> Tensor:
    return unpack(kept) if isinstance(kept, Packed) else kept
