"""Matrices that nobody has written yet: what SwiGLU or RMSNorm makes of rows that are there, and SwiGLU's gradient.

`kernels.quantize` makes them on the way into FP8, so that they are in memory in 8 bits only. Where no kernel can,
they are written first; the numbers are the same, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_davinci.kernels import rms_norm, swiglu


class Gated(NamedTuple):
    """silu(gate) * up.

    Attributes:
        rows: [rows, 2 columns] bf16 or fp32, contiguous: all gates of a row, and behind them what they gate.
    """

    rows: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.rows.shape[0], self.rows.shape[1] // 2

    def written(self) -> Tensor:
        """The matrix."""
        product: Tensor = swiglu.forward(self.rows)
        return product


class Normed(NamedTuple):
    """Rows that are normalised.

    Attributes:
        rows: [rows, columns] bf16 or fp32, contiguous.
        weight: [columns] of the same dtype.
        scale: [rows] fp32, from `rms_norm.scale_of`.
    """

    rows: Tensor
    weight: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.rows.shape[0], self.rows.shape[1]

    def written(self) -> Tensor:
        """The matrix."""
        return rms_norm.plain_rows(self.rows, self.weight, self.scale.unsqueeze(-1))


class GatedGradient(NamedTuple):
    """The gradient through silu(gate) * up: all gates' of a row, and behind them that of what they gate.

    Attributes:
        rows: [rows, columns] bf16 or fp32, contiguous, of which SwiGLU made its product.
        by_product: [rows, columns / 2] of the same dtype, contiguous: the product's gradient.
    """

    rows: Tensor
    by_product: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.rows.shape[0], self.rows.shape[1]

    def written(self) -> Tensor:
        """The matrix."""
        by_rows: Tensor = swiglu.backward(self.by_product, self.rows)
        return by_rows


Matrix = Tensor | Gated | Normed | GatedGradient
"""What can be put into FP8."""


def written(x: Matrix) -> Tensor:
    """The matrix in memory."""
    return x if isinstance(x, Tensor) else x.written()


def parts(x: Matrix) -> tuple[str, Tensor, Tensor | None, Tensor | None]:
    """What it is made by, and what of.

    Returns:
        `none`, `swiglu`, `norm` or `swiglu_gradient`; the rows; their scales, of a norm; and what is beside them, the
        norm's weight or the gradient of SwiGLU's product.
    """
    if isinstance(x, Tensor):
        return "none", x, None, None
    if isinstance(x, Gated):
        return "swiglu", x.rows, None, None
    if isinstance(x, Normed):
        return "norm", x.rows, x.scale, x.weight
    return "swiglu_gradient", x.rows, None, x.by_product


def of_parts(made: str, rows: Tensor, scale: Tensor | None, beside: Tensor | None) -> Matrix:
    """The matrix of what `parts` says."""
    if made == "none":
        return rows
    if made == "swiglu":
        return Gated(rows)
    assert beside is not None, "a norm has a weight, and a product a gradient"
    if made == "swiglu_gradient":
        return GatedGradient(rows, beside)
    assert scale is not None, "normalised rows have scales"
    return Normed(rows, beside, scale)
