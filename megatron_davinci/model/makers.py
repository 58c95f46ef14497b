"""What makes the input of a linear layer on its way into FP8, and takes its gradient back: SwiGLU or RMSNorm.

The input is never written. Beside the pass over memory that is saved, nothing of it is kept: backward makes it again
of the rows that are kept anyway, the transposed codes of the weight's gradient among it. Every number is that of the
layer behind an activation of its own, to the bit.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megatron_davinci.kernels import rms_norm, swiglu
from megatron_davinci.kernels.made import Gated, GatedGradient, Matrix, Normed


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
