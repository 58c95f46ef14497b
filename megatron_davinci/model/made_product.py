"""A linear layer behind SwiGLU or RMSNorm whose input goes into FP8 as it is made, and is never written.

Beside the pass over memory that is saved, nothing of that input is kept: backward makes it again of the rows that are
kept anyway, the transposed codes of the weight's gradient among it. Every number is that of the layer behind an
activation of its own, to the bit.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_davinci.kernels import rms_norm, swiglu
from megatron_davinci.kernels.made import Gated, GatedGradient, Matrix, Normed, written
from megatron_davinci.kernels.main_gradient import MainGradient
from megatron_davinci.model import unwritten
from megatron_davinci.precision.products import shaped


class Maker(Protocol):
    """What makes a layer's input."""

    @property
    def weight(self) -> Tensor | None:
        """Its own parameter; None where it has none."""

    def begin(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What it wants to know of [rows, width] beside them, kept for backward."""

    def matrix(self, rows: Tensor, *known: Tensor) -> Matrix:
        """What it makes of them."""

    def backward(self, by_matrix: Tensor, rows: Tensor, *known: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the rows and of the parameter."""

    def unwritten(self, by_matrix: Tensor, rows: Tensor) -> Matrix | None:
        """What the gradient of the rows is to be made of; None where it is to be written."""


class SwiGLU:
    """silu(gate) * up."""

    weight = None

    def begin(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def matrix(self, rows: Tensor, *known: Tensor) -> Gated:
        """The product."""
        return Gated(rows)

    def backward(self, by_matrix: Tensor, rows: Tensor, *known: Tensor) -> tuple[Tensor, None]:
        """The gradient of gates and what they gate."""
        return swiglu.backward(by_matrix.contiguous(), rows), None

    def unwritten(self, by_matrix: Tensor, rows: Tensor) -> GatedGradient:
        """The same."""
        return GatedGradient(rows, by_matrix.contiguous())


class Norm:
    """RMSNorm.

    Args:
        module: The norm, which has `weight` and `eps`.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def weight(self) -> Tensor:
        """The norm's."""
        weight: Tensor = self._module.weight
        return weight

    def begin(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The scale of each row."""
        return (rms_norm.scale_of(rows, self.weight.detach(), self._module.eps),)

    def matrix(self, rows: Tensor, *known: Tensor) -> Normed:
        """The normalised rows."""
        return Normed(rows, self.weight.detach(), *known)

    def backward(self, by_matrix: Tensor, rows: Tensor, *known: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the rows and of the norm's weight."""
        by_rows, by_weight = rms_norm.backward(
            by_matrix.contiguous(), None, rows, self.weight.detach(), *known
        )
        return by_rows, by_weight

    def unwritten(self, by_matrix: Tensor, rows: Tensor) -> None:
        """It is added to that of the residual."""


class MadeProduct(torch.autograd.Function):
    """`product`'s three products of an input that `maker` makes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        own: Tensor | None,
        product: Any,
        maker: Maker,
        reduces: bool,
        source: Any | None,
    ) -> Tensor:
        """[positions, batch, width] and [out, in] to [positions, batch, out].

        `own` is the maker's parameter, `source` the node of the layer that made the input for this one alone.
        """
        rows = input.flatten(0, -2).contiguous()
        known = maker.begin(rows)
        ctx.parameter, ctx.product, ctx.maker, ctx.reduces = weight, product, maker, reduces
        ctx.source, ctx.unwritten = source, None
        # The backward pass may come when the next micro-batch has begun.
        ctx.samples, ctx.shape = product.shared.samples, input.shape
        matrix, turned = maker.matrix(rows, *known), None
        if product.shared.forward:
            both = product.shared.keep_codes and product.shared.backward
            quantized = product.input(matrix, both=both)
            turned = product.for_backward(quantized)
            out = product.forward_product(quantized, weight, rows.dtype)
        else:
            out = torch.matmul(written(matrix), weight.t())
        ctx.known = len(known)
        ctx.save_for_backward(rows, weight, *known, *(turned or ()))
        return shaped(out, (*input.shape[:-1], weight.shape[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the rows, of the weight where it has no `main_grad`, and of the maker's parameter."""
        rows, weight, *more = ctx.saved_tensors
        known, turned = more[: ctx.known], tuple(more[ctx.known :])
        product, maker = ctx.product, ctx.maker
        product.shared.samples = ctx.samples
        low = product.shared.backward
        g, matrix = by_out.flatten(0, -2), unwritten.take(ctx, by_out)
        assert low or matrix is None, "only what is multiplied in FP8 is given what is not written"
        quantized = product.gradient(g if matrix is None else matrix) if low else None
        del matrix  # and what it was to be made of, of which there are codes now
        by_matrix = product.input_gradient(quantized, g, weight) if low else torch.matmul(g, weight)
        if ctx.reduces:
            dist.all_reduce(by_matrix, group=product.linear.tp_group)
        by_weight = None
        if ctx.needs_input_grad[1]:
            matrix, main = maker.matrix(rows, *known), MainGradient(ctx.parameter)
            if low:
                kept = product.kept_for_backward(turned) if turned else matrix
                product.add_to(main, *product.weight_gradient(quantized, g, kept))
            else:
                main.add(g, written(matrix))
            by_weight = main.gradient()
        if unwritten.takes(ctx.source) and (gradient := maker.unwritten(by_matrix, rows)) is not None:
            return unwritten.give(ctx.source, gradient, ctx.shape), by_weight, *[None] * 5
        by_rows, by_own = maker.backward(by_matrix, rows, *known)
        return by_rows.view(ctx.shape), by_weight, by_own, *[None] * 4
