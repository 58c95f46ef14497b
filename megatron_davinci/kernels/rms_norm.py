"""RMSNorm, and with it the addition of the residual before it: one pass over a row each way.

Of a row x: `x * s * weight`, with s one over the root of the mean square (Zhang and Sennrich, 2019, arXiv
1910.07467). Backward also takes the gradient of what was normalised, which comes along the residual stream, and adds
it. Beside its inputs it keeps one fp32 number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels.column_sums import parts, sum_columns
from megatron_davinci.kernels.operators import operator
from megatron_davinci.kernels.ways import way_of

_OP = "rms_norm"
_KEPT = 16  # kElements of csrc/kernels/rms_norm.cu
_THREADS = 256
_WARP = 32
_PARTS = 512  # sets of rows that share the weight's gradient, at most: about four for each multiprocessor of an H100


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows.

    Args:
        x: [..., width] bf16 or fp32; kernels compute in fp32.
        weight: [width] of the same dtype.
        eps: Added to the mean square.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together.
    """
    _check(x, weight)
    normal: Tensor = _Norm.apply(_as_rows(x), weight, eps)
    return normal.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalise the sum.

    Args:
        x: [..., width] bf16 or fp32; kernels compute in fp32.
        residual: The same.
        weight: [width] of the same dtype.
        eps: Added to the mean square.

    Returns:
        The normalised sum, and the sum as it is rounded, which is what was normalised.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together.
    """
    _check(x, weight, residual)
    normal, total = _AddNorm.apply(_as_rows(x), _as_rows(residual), weight, eps)
    return normal.view(x.shape), total.view(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normal, _, scale = forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_normal: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        by_x, by_weight = backward(by_normal.contiguous(), None, x, weight, scale)
        return by_x, by_weight, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normal, total, scale = forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)
        return normal, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_normal: Tensor | None, by_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        if by_normal is None:
            return by_total, by_total, None, None
        by_total = None if by_total is None else by_total.contiguous()
        by_x, by_weight = backward(by_normal.contiguous(), by_total, total, weight, scale)
        return by_x, by_x, by_weight, None


@operator(
    "davinci::rms_norm_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
)
def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise rows, or the sums of two.

    Args:
        x: [rows, width] bf16 or fp32.
        residual: The same; None to add nothing.
        weight: [width] of the same dtype.
        eps: Added to the mean square.

    Returns:
        [rows, width] normalised; the sum that was, empty where nothing is added; and [rows] fp32, one over the root
        of the mean square.
    """
    rows, width = x.shape
    given = (x, weight) if residual is None else (x, weight, residual)
    way = way_of(_OP, *given)
    if not way.has_kernels:
        total = x if residual is None else x + residual
        normal, scale = plain_forward(total, weight, eps)
        return normal, x.new_empty(0) if residual is None else total, scale.flatten()
    normal, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if x.numel():
        added = (0, weight, 0) if residual is None else (residual, weight, total)
        kind, blocks = _plan(rows, width, *given)
        way.launch(f"rms_norm_forward_{kind}", blocks, x, x, *added, normal, scale, rows, width, eps)
    return normal, total, scale


@operator("davinci::rms_norm_scale", mutates_args=(), schema="(Tensor x, Tensor weight, float eps) -> Tensor")
def scale_of(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What rows are multiplied by to be normalised, without normalising them.

    Args:
        x: [rows, width] bf16 or fp32.
        weight: [width] of the same dtype; not read.
        eps: Added to the mean square.

    Returns:
        [rows] fp32, to the bit what `forward` returns.
    """
    rows, width = x.shape
    way = way_of(_OP, x, weight)
    if not way.has_kernels:
        return plain_scale(x, eps).flatten()
    scale = x.new_empty(rows, dtype=torch.float32)
    if x.numel():
        kind, blocks = _plan(rows, width, x, weight)
        way.launch(f"rms_norm_forward_{kind}", blocks, x, x, 0, weight, 0, 0, scale, rows, width, eps)
    return scale


@operator(
    "davinci::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor by_normal, Tensor? by_total, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
)
def backward(
    by_normal: Tensor, by_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised and of the weight.

    Args:
        by_normal: [rows, width], the gradient of the rows that came out.
        by_total: The same of those that were normalised, on another way; None where there is none.
        x: [rows, width], what was normalised.
        weight: [width].
        scale: [rows] fp32, from `forward`.

    Returns:
        [rows, width] and [width], both of the dtype of `x`.
    """
    rows, width = x.shape
    given = (x, by_normal, weight) if by_total is None else (x, by_normal, weight, by_total)
    way = way_of(_OP, *given, scale)
    if not way.has_kernels:
        return plain_backward(by_normal, by_total, x, weight, scale.unsqueeze(-1))
    by_x = torch.empty_like(x)
    if not x.numel():
        return by_x, torch.zeros_like(weight)
    kind, blocks = _plan(rows, width, *given)
    by_weight, shares = (
        torch.empty_like(weight),
        x.new_empty((parts(way, blocks, _PARTS), width), dtype=torch.float32),
    )
    beside = 0 if by_total is None else by_total
    arguments = (by_normal, beside, x, weight, scale, by_x, shares, rows, width, len(shares))
    way.launch(f"rms_norm_backward_{kind}", len(shares), x, *arguments)
    sum_columns(way, shares, by_weight)
    return by_x, by_weight


@forward.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return (
        torch.empty_like(x),
        total,
        x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@scale_of.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@backward.register_fake
def _(
    by_normal: Tensor, by_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def plain_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """In plain torch, in fp32 or wider: the normalised rows, and [..., 1] one over the root of the mean square."""
    scale = plain_scale(x, eps)
    return plain_rows(x, weight, scale), scale


def plain_scale(x: Tensor, eps: float) -> Tensor:
    """[..., 1] one over the root of the mean square, in fp32 or wider."""
    return torch.rsqrt(widened(x).square().mean(-1, keepdim=True) + eps)


def plain_rows(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows times their scales [..., 1] and the weights, rounded once."""
    return (widened(x) * scale * weight).to(x.dtype)


def plain_backward(
    by_normal: Tensor, by_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Its gradients, of what was normalised and of the weight."""
    normal, above = widened(x) * scale, widened(by_normal)
    by_weight = (above * normal).flatten(0, -2).sum(0)
    above = above * weight
    by_x = (above - normal * (above * normal).mean(-1, keepdim=True)) * scale
    if by_total is not None:
        by_x = by_x + by_total
    return by_x.to(x.dtype), by_weight.to(weight.dtype)


def widened(x: Tensor) -> Tensor:
    """In fp32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plan(rows: int, width: int, *tensors: Tensor) -> tuple[str, int]:
    """Which kernel takes rows, and of how many blocks there is work for."""
    vector = 16 // tensors[0].element_size()
    if width % vector or width > _THREADS * _KEPT or any(one.data_ptr() % 16 for one in tensors):
        return "any", rows
    if _WARP * _KEPT < width <= _THREADS * vector:
        return "one", -(-rows // (_THREADS // _WARP))
    return "many", -(-rows // (_THREADS // _WARP)) if width <= _WARP * _KEPT else rows


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    if x.dim() < 1 or not x.shape[-1] or weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight is {list(weight.shape)} for rows of {list(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual is {list(residual.shape)} for rows of {list(x.shape)}")
    for name, tensor in (("the weight", weight), ("the residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or not x.dtype.is_floating_point:
            raise ValueError(f"rows are {x.dtype}, {name} {tensor.dtype}: one floating dtype is expected")
        if tensor.device != x.device:
            raise ValueError(f"rows are on {x.device}, {name} on {tensor.device}")
