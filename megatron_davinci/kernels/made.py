"""Matrices that nobody has written yet: what SwiGLU or RMSNorm makes of rows that are there, and SwiGLU's gradient.

`kernels.quantize` makes them on the way into FP8, so that they are in memory in 8 bits only. Where no kernel can,
they are written first; the numbers are the same, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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


def check(x: Matrix) -> None:
    """Refuse a matrix whose parts do not go together, since a kernel reads them as what they ought to be.

    Raises:
        ValueError: A part has another shape or dtype than the rows want.
    """
    made, rows, scale, beside = parts(x)
    if made == "none":
        return
    height, width = rows.shape
    if made != "norm" and width % 2:
        raise ValueError(f"rows of {list(rows.shape)} are not of gates and as many that they gate")
    if beside is not None:
        expected = [width] if made == "norm" else [height, width // 2]
        what = "the weight of a norm" if made == "norm" else "the gradient of a product"
        if list(beside.shape) != expected or beside.dtype != rows.dtype:
            raise ValueError(
                f"{what} is {beside.dtype} {list(beside.shape)} for rows of {rows.dtype} {list(rows.shape)}"
            )
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != rows.shape[:1]):
        raise ValueError(
            f"the scales of {height} rows are {scale.dtype} {list(scale.shape)}, not torch.float32"
        )


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
