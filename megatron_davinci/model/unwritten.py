"""A gradient that is not written on its way from one linear layer's backward pass to that of the layer before it.

Autograd wants a tensor of whoever returns a gradient. Here that is one number in memory, NaN, which stands for all of
them; what the gradient is to be made of (`kernels.made`) is left with the node of the layer before. That layer takes
it if what autograd brings is that very tensor. Whoever else looks at it sees no number, and never a wrong one.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels.made import Matrix

_log = logging.getLogger(__name__)


def node_of(x: Tensor, product: Any) -> Any | None:
    """The node of autograd with `x`'s gradient.

    Args:
        x: What a layer is given.
        product: Of the layer that alone may have made it; None for nobody.

    Returns:
        The node; None where nothing is to be differentiated, or where something else made `x` or did something to it,
        which is said once.
    """
    node = x.grad_fn
    if product is None or node is None:
        return None
    if getattr(node, "product", None) is product:
        return node
    if product.shared.backward:  # and not in the tail, where another product may have made it
        _declined()
    return None


def takes(node: Any) -> bool:
    """Whether a node's products can be given a gradient that is not written: they are in FP8, with a scale a tensor.

    Where somebody looks for NaN in what autograd brings (`torch.autograd.detect_anomaly`), none can.
    """
    if node is None or torch.is_anomaly_enabled():
        return False
    shared = node.product.shared
    return bool(shared.backward and shared.recipe.gradient.blocks == "tensor")


def give(node: Any, matrix: Matrix, shape: torch.Size) -> Tensor:
    """Leave a gradient with a node.

    Args:
        node: One that takes it.
        matrix: [tokens, out], what it is to be made of.
        shape: Of the node's output: [positions, batch, out].

    Returns:
        What goes through autograd in its place.
    """
    node.unwritten = matrix
    return _no_number(*_kind(matrix)).expand(shape)


def take(node: Any, by_out: Tensor) -> Matrix | None:
    """The gradient that was left with a node; None where it came through autograd.

    Args:
        node: Whose backward pass this is.
        by_out: What autograd brings.

    Raises:
        RuntimeError: A gradient was left, and autograd brings another one: of two, or of one that somebody changed.
    """
    matrix: Matrix | None = node.unwritten
    node.unwritten = None
    if matrix is None:
        return None
    if _memory(by_out) != _memory(_no_number(*_kind(matrix))):
        raise RuntimeError(
            f"{node.product.name}: its outputs are used by more than SwiGLU behind it, or a hook has changed their "
            "gradient, which is not written where both linear layers of an MLP multiply in FP8; whoever wants it can "
            "set `source = None` of the product behind"
        )
    return matrix


def _kind(matrix: Matrix) -> tuple[torch.dtype, torch.device]:
    rows = matrix if isinstance(matrix, Tensor) else matrix.rows
    return rows.dtype, rows.device


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@cache
def _declined() -> None:
    _log.warning(
        "The gradient through SwiGLU is written before it goes into FP8: something is between the two linear layers "
        "of an MLP, a bias or what a hook returned"
    )


@cache
def _no_number(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)
