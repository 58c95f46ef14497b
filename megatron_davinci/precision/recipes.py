"""Recipes: which format and which scales each operand of a linear layer's three products has.

With inputs x [tokens, in], weights w [out, in] and gradients g [tokens, out] of the outputs, they are
`y = x wᵀ`, `dx = g w` and `dw = gᵀ x`. Each sums over the last dimension of its two operands when they are written as
`x, w`, as `g, wᵀ` and as `gᵀ, xᵀ`, and blocks of a row lie along that dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_davinci.precision.formats import E2M1, E4M3, E5M2, Format
from megatron_davinci.precision.scaling import Quantizer


@dataclass(frozen=True)
class Recipe:
    """How each operand is quantised.

    Attributes:
        name: As the configuration has it.
        input: x of the forward product.
        weight: w of the forward product.
        gradient: g, of which the inputs' gradient is made.
        weight_back: wᵀ, of which the inputs' gradient is made.
        input_back: xᵀ, of which the weights' gradient is made.
        gradient_back: gᵀ, of which the weights' gradient is made.
        delayed: Whether scales come from the largest numbers of earlier steps.
    """

    name: str
    input: Quantizer
    weight: Quantizer
    gradient: Quantizer
    weight_back: Quantizer
    input_back: Quantizer
    gradient_back: Quantizer
    delayed: bool = False

    @property
    def block(self) -> int:
        """What a dimension that is summed over must be a multiple of."""
        every = (
            self.input,
            self.weight,
            self.gradient,
            self.weight_back,
            self.input_back,
            self.gradient_back,
        )
        return max([one.block for one in every if one.blocks != "tensor"], default=1)


def tensor_scaled(*, delayed: bool) -> Recipe:
    """FP8 with a scale a tensor: E4M3 forwards, E5M2 for gradients (arXiv 2209.05433, section 5).

    Args:
        delayed: Take scales from the largest numbers of earlier steps.
    """
    forward, backward = Quantizer(E4M3), Quantizer(E5M2)
    name = "delayed" if delayed else "current"
    return Recipe(name, forward, forward, backward, forward, forward, backward, delayed)


def block_scaled() -> Recipe:
    """E4M3 with scales of 1 x 128 of inputs and gradients, and 128 x 128 of weights.

    DeepSeek-AI, 2024, DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2. Scales are powers of two, as
    Transformer Engine has them.
    """
    row = Quantizer(E4M3, "row", 128, "power_of_two")
    tile = Quantizer(E4M3, "tile", 128, "power_of_two")
    return Recipe("block", row, tile, row, tile, row, row)


def mxfp8() -> Recipe:
    """E4M3 with E8M0 scales of 32 along the sum (Mishra et al., 2025, arXiv 2506.08027)."""
    row = Quantizer(E4M3, "row", 32, "e8m0")
    return Recipe("mxfp8", row, row, row, row, row, row)


def nvfp4(*, seed: int, hadamard: bool = True, tiles: bool = True, stochastic: bool = True) -> Recipe:
    """E2M1 with two levels of scales (NVIDIA, 2025, arXiv 2509.25149, section 4).

    Args:
        seed: Of the signs of the transform.
        hadamard: Transform both operands of the weights' gradient.
        tiles: Scale weights by 16 x 16, so that both products see the same weights; else 1 x 16.
        stochastic: Round gradients stochastically.
    """
    row = Quantizer(E2M1, "row", 16, "e4m3")
    weight = replace(row, blocks="tile") if tiles else row
    gradient = replace(row, rounding="stochastic") if stochastic else row
    signs = seed if hadamard else None
    return Recipe(
        "nvfp4",
        row,
        weight,
        gradient,
        weight,
        replace(row, hadamard=signs),
        replace(gradient, hadamard=signs),
    )


def bit_reduction(form: Format, *, truncate: bool, scaled: bool) -> Recipe:
    """Every operand in one format (Lee et al., 2024, To FP8 and Back Again, arXiv 2405.18710).

    Args:
        form: The format.
        truncate: Leave low bits out, as the paper does; else round to the nearest.
        scaled: Bring the largest number of each tensor to the format's largest, 2^32 at most; the paper scales
            nothing.
    """
    one = Quantizer(form, scale="fp32" if scaled else "none", rounding="truncate" if truncate else "nearest")
    return Recipe("bits", one, one, one, one, one, one)
