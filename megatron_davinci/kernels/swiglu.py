"""SwiGLU, and the linear layer behind it: silu(gate) * up of rows that hold both, and what need not be kept of it.

Shazeer, 2020, GLU Variants Improve Transformer, arXiv 2002.05202. Backward writes the gradient where the rows were,
and computes the product again in the same pass, for the gradient of the weight behind it. So of three tensors of a
layer's inner width two are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels.main_gradient import MainGradient
from megatron_davinci.kernels.operators import operator
from megatron_davinci.kernels.ways import way_of

_OP = "swiglu"
_CHUNK = 1024  # packs of a block of the kernel


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of each row, times the second half.

    Args:
        x: [..., 2 width] bf16 or fp32; kernels compute in fp32.

    Returns:
        [..., width].

    Raises:
        ValueError: Rows are not of two halves, or no floats.
    """
    _check(x)
    product: Tensor = _SwiGLU.apply(x.contiguous())
    return product


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu(x) @ weight.t()`, of which only `x` is kept; backward overwrites it by its gradient, once.

    Args:
        x: [..., 2 width] bf16 or fp32, contiguous, not a leaf, and used by nobody else.
        weight: [out, width] of the same dtype. Where it has a `main_grad`, as in Megatron-Core's
            DistributedDataParallel, its gradient is added to that, and `grad_added_to_main_grad` says so.

    Returns:
        [..., out].

    Raises:
        ValueError: Shapes or dtypes do not go together, or `x` is a leaf that wants a gradient.
    """
    _check(x)
    if weight.dim() != 2 or weight.shape[1] * 2 != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"the weight is {weight.dtype} {list(weight.shape)} for rows of {x.dtype} {list(x.shape)}"
        )
    if not x.is_contiguous():
        raise ValueError("rows are not contiguous, so they cannot be overwritten")
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("rows are a leaf that wants a gradient, and would be overwritten")
    out: Tensor = _SwiGLULinear.apply(x, weight)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_product: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        by_x: Tensor = backward(by_product.contiguous(), x)
        return by_x


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # Detached: what autograd knows of it ends here, and only its memory is wanted.
        ctx.save_for_backward(x.detach(), weight)
        ctx.parameter, ctx.taken = weight, False
        return torch.matmul(forward(x), weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.taken:
            raise RuntimeError(
                "swiglu_linear: backward was called twice, and the first call overwrote the rows"
            )
        ctx.taken = True
        x, weight = ctx.saved_tensors
        by_out = by_out.contiguous()
        product = backward_again_(torch.matmul(by_out, weight), x)
        if not ctx.needs_input_grad[1]:
            return x, None
        main = MainGradient(ctx.parameter)
        main.add(by_out.flatten(0, -2), product.flatten(0, -2))
        return x, main.gradient()


@operator("davinci::swiglu_forward", mutates_args=(), schema="(Tensor x) -> Tensor")
def forward(x: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        x: [..., 2 width] bf16 or fp32.

    Returns:
        [..., width].
    """
    way = way_of(_OP, x)
    if not way.has_kernels:
        gate, up = _halves(x)
        return (gate * torch.sigmoid(gate) * up).to(x.dtype)
    rows, width = _size(x)
    out = x.new_empty((*x.shape[:-1], width))
    if out.numel():
        way.launch("swiglu_forward", _blocks(width, x, out), x, x, out, rows, width)
    return out


@operator("davinci::swiglu_backward", mutates_args=(), schema="(Tensor by_product, Tensor x) -> Tensor")
def backward(by_product: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x`.

    Args:
        by_product: [..., width].
        x: [..., 2 width], what forward took.
    """
    way = way_of(_OP, x, by_product)
    if not way.has_kernels:
        return _plain_backward(by_product, x)[0]
    by_x, (rows, width) = torch.empty_like(x), _size(x)
    if x.numel():
        blocks = _blocks(width, x, by_product, by_x)
        way.launch("swiglu_backward", blocks, x, by_product, x, by_x, 0, rows, width)
    return by_x


@operator(
    "davinci::swiglu_backward_again_",
    mutates_args={"x"},
    schema="(Tensor by_product, Tensor(a!) x) -> Tensor",
)
def backward_again_(by_product: Tensor, x: Tensor) -> Tensor:
    """Overwrite `x` by its gradient, and compute what forward did once more.

    Args:
        by_product: [..., width].
        x: [..., 2 width].

    Returns:
        [..., width], to the bit what forward returned.
    """
    way = way_of(_OP, x, by_product)
    if not way.has_kernels:
        by_x, again = _plain_backward(by_product, x)
        x.copy_(by_x)
        return again
    again, (rows, width) = torch.empty_like(by_product), _size(x)
    if x.numel():
        way.launch(
            "swiglu_backward", _blocks(width, x, by_product, again), x, by_product, x, x, again, rows, width
        )
    return again


@forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@backward.register_fake
def _(by_product: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@backward_again_.register_fake
def _(by_product: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(by_product)


def _plain_backward(by_product: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = _halves(x)
    s = torch.sigmoid(gate)
    silu, above = gate * s, by_product.to(gate.dtype)
    by_gate = above * up * (s * (1 + gate * torch.sigmoid(-gate)))
    return torch.cat([by_gate, above * silu], -1).to(x.dtype), (silu * up).to(x.dtype)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)


def _size(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1] // 2
    return x.numel() // max(1, 2 * width), width


def _blocks(width: int, x: Tensor, *others: Tensor) -> int:
    vector = 16 // x.element_size()
    alone = width % vector or any(one.data_ptr() % 16 for one in (x, *others))
    packs = x.numel() // 2 // (1 if alone else vector)
    return -(-packs // _CHUNK)


def _check(x: Tensor) -> None:
    if x.dim() < 1 or not x.shape[-1] or x.shape[-1] % 2 or not x.dtype.is_floating_point:
        raise ValueError(f"rows are {x.dtype} {list(x.shape)}: floats of two halves are expected")
