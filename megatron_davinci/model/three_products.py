"""The three products of a linear layer as one node of autograd, whoever multiplies them.

What is kept for the backward pass, what ranks tell each other, and where gradients go is as in Megatron-Core's
`LinearWithGradAccumulationAndAsyncCommunication`. The products are those of `low_precision` or `native_product`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_davinci.kernels.made import Matrix, written
from megatron_davinci.kernels.main_gradient import MainGradient
from megatron_davinci.model import unwritten
from megatron_davinci.model.makers import Maker
from megatron_davinci.precision.products import shaped


class ThreeProducts(torch.autograd.Function):
    """`product`'s, of an input as it is, or one that `maker` makes of it."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        own: Tensor | None,
        product: Any,
        maker: Maker | None,
        gathers: bool,
        reduces: bool,
        source: Any | None,
    ) -> Tensor:
        """`x wᵀ`.

        Args:
            ctx: Autograd's node.
            input: [positions on this rank, batch, width].
            weight: [out, in], this rank's part.
            own: The maker's parameter.
            product: Whose products they are.
            maker: What makes [tokens, in] of the input; None for the input.
            gathers: Whether ranks have parts of the positions; then nothing is made.
            reduces: Whether the input's gradient is a sum over ranks.
            source: The node of the layer that made the input for this one alone; None where there is none.

        Returns:
            [positions, batch, out].
        """
        assert maker is None or not gathers, "ranks have parts of what is to be made"
        shared = product.shared
        ctx.parameter, ctx.product, ctx.maker, ctx.source = weight, product, maker, source
        ctx.gathers, ctx.reduces, ctx.kept = gathers, reduces, False
        # The backward pass may come when the next micro-batch has begun.
        ctx.samples, ctx.shape, ctx.unwritten = shared.samples, input.shape, None
        saved: Tensor | None = input
        known: tuple[Tensor, ...] = ()
        turned: tuple[Tensor, ...] | None = None
        matrix: Matrix
        if maker is None:
            matrix = _whole(input, product, gathers).flatten(0, -2)
        else:
            saved = rows = input.flatten(0, -2).contiguous()
            known = maker.begin(rows)
            matrix = maker.matrix(rows, *known)
        if not shared.forward:
            out = torch.matmul(written(matrix), weight.t())
        else:
            # What is gathered from ranks is not kept whole.
            quantized = product.input(matrix, both=shared.keep_codes and shared.backward and not gathers)
            turned = product.for_backward(quantized)
            out = product.forward_product(quantized, weight, input.dtype)
            if maker is None and product.keeps_codes:
                codes, inverse = product.own_codes(quantized)
                ctx.kept, saved, known = True, _own_part(codes, input.shape, product, gathers), (inverse,)
            elif maker is None and turned is not None:
                saved = None
        ctx.known = len(known)
        ctx.save_for_backward(saved, weight, *known, *(turned or ()))
        return shaped(out, (-1, input.shape[1], weight.shape[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the input, of the weight where it has no `main_grad`, and of the maker's parameter."""
        saved, weight, *more = ctx.saved_tensors
        known, turned = tuple(more[: ctx.known]), tuple(more[ctx.known :])
        product, maker = ctx.product, ctx.maker
        product.shared.samples = ctx.samples
        low = product.shared.backward
        g, matrix = by_out.flatten(0, -2), unwritten.take(ctx, by_out)
        assert low or matrix is None, "only what is multiplied in FP8 is given what is not written"
        quantized = product.gradient(g if matrix is None else matrix) if low else None
        del matrix  # and what it was to be made of, of which there are codes now
        by_x = product.input_gradient(quantized, g, weight) if low else torch.matmul(g, weight)
        by_x = by_x.view(-1, ctx.shape[1], weight.shape[1])
        if ctx.gathers:
            by_x = reduce_scatter_to_sequence_parallel_region(by_x, group=product.linear.tp_group)
        elif ctx.reduces:
            dist.all_reduce(by_x, group=product.linear.tp_group)
        by_weight = None
        if ctx.needs_input_grad[1]:
            main = MainGradient(ctx.parameter)
            if not low:
                assert not (ctx.kept or turned), "codes are kept of what is multiplied in few bits"
                main.add(g, written(_input(ctx, saved, known)))
            else:
                kept = product.kept_for_backward(turned) if turned else _input(ctx, saved, known)
                product.add_to(main, *product.weight_gradient(quantized, g, kept))
            by_weight = main.gradient()
        if maker is None:
            return by_x, by_weight, *[None] * 6
        by_matrix = by_x.flatten(0, -2)
        if unwritten.takes(ctx.source) and (gradient := maker.unwritten(by_matrix, saved)) is not None:
            return unwritten.give(ctx.source, gradient, ctx.shape), by_weight, *[None] * 6
        by_rows, by_own = maker.backward(by_matrix, saved, *known)
        return by_rows.view(ctx.shape), by_weight, by_own, *[None] * 5


def _input(ctx: Any, saved: Tensor, known: tuple[Tensor, ...]) -> Any:
    """What was multiplied, of what was saved of it."""
    if ctx.maker is not None:
        return ctx.maker.matrix(saved, *known)
    x = _whole(saved, ctx.product, ctx.gathers).flatten(0, -2)
    return ctx.product.kept_input(x.view(saved.dtype), *known) if ctx.kept else x


def _own_part(codes: Tensor, shape: torch.Size, product: Any, gathers: bool) -> Tensor:
    """The codes of this rank's positions: [positions, batch, in] of one byte."""
    codes = codes.view(-1, *shape[1:])
    rank = product.linear.tp_group.rank() if gathers else 0
    return codes.narrow(0, rank * shape[0], shape[0]).contiguous()


def _whole(input: Tensor, product: Any, gathers: bool) -> Tensor:
    """All positions, where tensor ranks have parts of them."""
    if not gathers:
        return input
    # Collectives know no FP8, and codes are bytes.
    sent = input.detach() if input.element_size() > 1 else input.view(torch.uint8)
    whole: Tensor = gather_from_sequence_parallel_region(sent, group=product.linear.tp_group)
    return whole
