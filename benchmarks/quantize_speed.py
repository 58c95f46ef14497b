"""How fast matrices go into FP8 on a GPU at the size of the report's model, and what making them on the way saves.

16,384 tokens in bf16: what the first linear layer of attention is given (2,048 wide) and the second of the MLP
(11,008), forward as they are, and for the weight's gradient transposed; and the gradient through SwiGLU, which the
first of the MLP is given backward, as it is and transposed. Bytes are those that have to move. One rival makes the
matrix first, by our own kernels, and quantises it then; the other is what torch's compiler makes of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.kernels import rms_norm, swiglu
from megatron_davinci.kernels.made import Gated, GatedGradient, Matrix, Normed, written
from megatron_davinci.kernels.quantize import Scales, amax_of, quantize

TOKENS, HIDDEN, WIDTH = 16384, 2048, 11008
EPS = 1e-6
FORM, FORM_OF_GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2

Seconds = Callable[..., float]
Measured = tuple[dict[str, float], dict[str, Any]]


def measure(
    device: torch.device, copy: float, seconds: Seconds, *, tokens: int = TOKENS, width: int = WIDTH
) -> Measured:
    """Times and fractions of a copy's bandwidth, and what rivals took.

    Args:
        device: The GPU.
        copy: Bytes a second that a copy reads and writes.
        seconds: Takes the median time of an action.
        tokens: Rows.
        width: Of the MLP, a multiple of 128.
    """
    gates = torch.randn(tokens, 2 * width, device=device, dtype=torch.bfloat16)
    rows = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    weight = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    scale = rms_norm.scale_of(rows, weight, EPS)
    made: dict[str, tuple[Matrix, Callable[[], Tensor], int]] = {
        "swiglu": (Gated(gates), lambda: swiglu.forward(gates), gates.numel() * 2),
        "norm": (Normed(rows, weight, scale), lambda: rms_norm.forward(rows, None, weight, EPS)[0], rows.numel() * 2),
    }  # fmt: skip
    figures: dict[str, float] = {}
    peer: dict[str, Any] = {}
    for name, (matrix, first, read) in made.items():
        there = written(matrix)
        known = amax_of(there)
        codes = there.numel()
        for scales, turned in (("tensor", False), ("tensor", True), ("rows", False), ("rows", True)):
            options: dict[str, Any] = {"plain": not turned, "turned": turned}
            options["known"] = known if scales == "tensor" else None
            taken = seconds(_quantising(matrix, scales, options))
            two = seconds(_both(first, scales, options))
            key = f"quantize_{name}_{scales}{'_turned' if turned else ''}"
            figures[f"{key}_ms"] = 1e3 * taken
            figures[f"{key}_fraction_of_copy"] = (read + codes) / taken / copy
            peer[f"{key}_made_before_ms"] = 1e3 * two
        largest = seconds(lambda matrix=matrix: amax_of(matrix))
        figures[f"amax_{name}_fraction_of_copy"] = read / largest / copy
        both = seconds(lambda there=there: quantize(there, FORM, "rows", turned=True))
        figures[f"quantize_both_ways_{name}_fraction_of_copy"] = 4 * codes / both / copy
        peer[f"torch_compile_{name}_tensor_ms"] = 1e3 * seconds(_compiled(matrix, known))
    _measure_gradient(gates, copy, seconds, figures, peer)
    return figures, peer


def _measure_gradient(
    gates: Tensor, copy: float, seconds: Seconds, figures: dict[str, float], peer: dict[str, Any]
) -> None:
    """The gradient through SwiGLU both ways with a known scale, beside the two kernels that write and read it."""
    by_product = torch.randn_like(gates[:, : gates.shape[1] // 2])
    gradient = GatedGradient(gates, by_product)
    options: dict[str, Any] = {"turned": True, "known": amax_of(gradient)}
    key, numbers = "quantize_swiglu_gradient_both_ways", gates.numel()
    taken = seconds(lambda: quantize(gradient, FORM_OF_GRADIENTS, "tensor", **options))
    figures[f"{key}_ms"] = 1e3 * taken
    figures[f"{key}_fraction_of_copy"] = (2 * numbers + 2 * by_product.numel() + 2 * numbers) / taken / copy
    peer[f"{key}_made_before_ms"] = 1e3 * seconds(
        lambda: quantize(swiglu.backward(by_product, gates), FORM_OF_GRADIENTS, "tensor", **options)
    )


def _quantising(matrix: Matrix, scales: Scales, options: dict[str, Any]) -> Callable[[], object]:
    return lambda: quantize(matrix, FORM, scales, **options)


def _both(first: Callable[[], Tensor], scales: Scales, options: dict[str, Any]) -> Callable[[], object]:
    return lambda: quantize(first(), FORM, scales, **options)


def _compiled(matrix: Matrix, known: Tensor) -> Callable[[], object]:
    """What torch's compiler makes of the operation and a scale a tensor."""
    top = torch.finfo(FORM).max

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return ((F.silu(gate) * up).float() * (top / known)).clamp(-top, top).to(FORM)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        normal = F.rms_norm(x, (x.shape[-1],), weight, EPS)
        return (normal.float() * (top / known)).clamp(-top, top).to(FORM)

    assert not isinstance(matrix, Tensor), "it is to be made"
    if isinstance(matrix, Gated):
        compiled = torch.compile(gated)
        return lambda: compiled(matrix.rows)
    both = torch.compile(normed)
    return lambda: both(matrix.rows, matrix.weight)
