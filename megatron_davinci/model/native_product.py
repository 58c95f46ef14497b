"""A linear layer's products by torch's own kernels for FP8, of codes that our kernels make.

The scales, the noted largest numbers and the rest are those of emulation (`LowPrecisionProduct`); here a matrix is
never held in fp32, and what is multiplied as it is and transposed is quantised both ways in one pass. What SwiGLU or
our RMSNorm makes is quantised as it is made (`fuse`), and so is the gradient through SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels.made import Matrix, written
from megatron_davinci.kernels.main_gradient import MainGradient
from megatron_davinci.kernels.quantize import Both, Codes, Scales, amax_of, quantize
from megatron_davinci.kernels.swiglu import swiglu
from megatron_davinci.model.low_precision import LowPrecisionProduct, Tensors, largest_of
from megatron_davinci.model.makers import Maker, Norm, SwiGLU
from megatron_davinci.model.norm import KernelRMSNorm
from megatron_davinci.model.three_products import ThreeProducts
from megatron_davinci.model.unwritten import node_of
from megatron_davinci.precision import products, scaling
from megatron_davinci.precision.scaling import Quantizer

_SCALES: dict[str, Scales] = {"tensor": "tensor", "row": "rows", "tile": "tiles"}


@dataclass(eq=False)
class NativeProduct(LowPrecisionProduct):
    """The products of one linear layer on torch's FP8 kernels: with a scale a tensor, or of blocks of 128.

    Attributes:
        maker: What makes the input of what the module is given, in place of `before`; None for nothing.
        source: The layer whose outputs are given to the maker, and to nobody else; None where that is not so.
        weight_codes: The weight's of this step, both ways; None where they are not kept, or not yet made.
    """

    maker: Maker | None = None
    source: NativeProduct | None = None
    weight_codes: Both | None = None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        """As `LowPrecisionProduct`."""
        if self.maker is None:
            return super().__call__(input, weight, bias, **how)
        gathers, reduces = bool(how.get("sequence_parallel")), bool(how.get("allreduce_dgrad"))
        own, source = self.maker.weight, node_of(input, self.source)
        out: Tensor = ThreeProducts.apply(input, weight, own, self, self.maker, gathers, reduces, source)
        return out if bias is None else out + bias

    def input(self, x: Matrix, *, both: bool = False) -> Both:
        """The input as `forward_product` multiplies it; `both`: and transposed, as `weight_gradient` does."""
        recipe = self.shared.recipe
        turned = both and recipe.input_back == recipe.input
        return self._codes(x, recipe.input, 0, sharded=self.sharded_input, turned=turned)

    def for_backward(self, quantized: Both) -> Tensors | None:
        """Transposed codes and their inverse scales; None where they were not made."""
        turned = quantized.turned
        return None if turned is None else (turned.codes, turned.inverse)

    def kept_for_backward(self, kept: Tensors) -> Both:
        """The input, transposed only."""
        codes, inverse = kept
        scales = _SCALES[self.shared.recipe.input_back.blocks]
        return Both(None, Codes(codes, inverse, scales), inverse)

    def forward_product(self, a: Both, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`x wᵀ`: [tokens, in] and [out, in] to [tokens, out]."""
        return products.native(_there(a.plain), _there(self._weight(weight, turned=False).plain), dtype)

    def _weight(self, weight: Tensor, *, turned: bool) -> Both:
        """The weight as it is, or transposed: made where it is needed, or once in a step and both ways."""
        shared, recipe = self.shared, self.shared.recipe
        keeps = shared.keep_codes and shared.learning and recipe.weight_back == recipe.weight
        if self.weight_codes is not None and keeps:
            return self.weight_codes
        made = self._codes(
            weight.detach(),
            recipe.weight_back if turned else recipe.weight,
            1,
            sharded=True,
            plain=keeps or not turned,
            turned=keeps or turned,
            seen=turned and shared.forward,
        )
        if keeps:
            self.weight_codes = made
        return made

    def gradient(self, g: Matrix) -> Both:
        """The gradient of the outputs, as `input_gradient` and, transposed, as `weight_gradient` multiplies it."""
        how = self.shared.recipe.gradient
        return self._codes(g, how, 2, sharded=not self.sharded_input, turned=True)

    def input_gradient(self, by_out: Both | None, g: Tensor, weight: Tensor) -> Tensor:
        """`g w`: [tokens, out] and [out, in] to [tokens, in]."""
        a = by_out or self.gradient(g)
        return products.native(_there(a.plain), _there(self._weight(weight, turned=True).turned), g.dtype)

    def weight_gradient(
        self, by_out: Both | None, g: Tensor, x: Matrix | Codes | Both
    ) -> tuple[Codes, Codes]:
        """The operands of `gᵀ x`, both with tokens last: [out, tokens] and [in, tokens]."""
        a = by_out or self.gradient(g)
        if isinstance(x, Both):
            return _there(a.turned), _there(x.turned)
        if isinstance(x, Codes):
            return _there(a.turned), x._replace(codes=x.codes.t().contiguous())
        how = self.shared.recipe.input_back
        b = self._codes(
            x, how, 0, sharded=self.sharded_input, plain=False, turned=True, seen=self.shared.forward
        )
        return _there(a.turned), _there(b.turned)

    def kept_input(self, codes: Tensor, inverse: Tensor) -> Codes:
        """The input, of codes that were kept."""
        return Codes(codes, inverse, "tensor")

    def own_codes(self, quantized: Both) -> tuple[Tensor, Tensor]:
        """Codes and inverse scale of an input that is kept."""
        made = _there(quantized.plain)
        return made.codes, made.inverse

    def product(self, a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
        """`a bᵀ`."""
        return products.native(a, b, dtype)

    def add_to(self, main: MainGradient, a: Codes, b: Codes) -> None:
        """Add `a bᵀ` to a weight's gradient; the first of a step is written where it belongs."""
        if (total := main.take_zero()) is not None:
            products.native_into(total, a, b)
        else:
            super().add_to(main, a, b)

    def _codes(
        self,
        x: Matrix,
        how: Quantizer,
        operand: int,
        *,
        sharded: bool,
        plain: bool = True,
        turned: bool = False,
        seen: bool = False,
    ) -> Both:
        """An operand. `seen`: it was quantised in the forward pass, and is not counted twice."""
        assert how.form.dtype is not None, "torch multiplies E4M3 and E5M2 only"
        shared, known = self.shared, self.known[operand]
        x, own = x.contiguous() if isinstance(x, Tensor) else x, None
        if how.blocks == "tensor" and known is None:
            own = known = largest_of(self._holders(operand, sharded), amax_of(x))
        out = quantize(
            x,
            how.form.dtype,
            _SCALES[how.blocks],
            plain=plain,
            turned=turned,
            known=known if how.blocks == "tensor" else None,
            noted=self.amax[operand] if shared.learning and not seen and own is None else None,
        )
        if shared.learning and not seen:
            if own is not None:  # of all ranks that have parts
                torch.maximum(self.amax[operand], own, out=self.amax[operand])
            if shared.watching:
                counted = scaling.quantize(
                    written(x).float(), replace(how, hadamard=None), amax=known, watch=True
                )
                self.count(operand, counted.lost)
        return out


def fuse(chunks: Sequence[Any], products: Sequence[LowPrecisionProduct]) -> None:
    """Have linear layers behind SwiGLU and our own RMSNorm make their inputs as they quantise them.

    The layer before SwiGLU is given the gradient of its outputs unwritten.
    Where activations are kept in 8 bits, where tensor ranks have parts of the sequence, and where norms are
    recomputed, things stay as they are: then somebody else has a use for what is made.

    Args:
        chunks: This rank's model chunks.
        products: All of theirs.
    """
    of = {(one.layer, one.place): one for one in products if isinstance(one, NativeProduct)}
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        number = layer.layer_number - 1
        if (number, "linear_fc2") not in of or of[number, "linear_fc2"].shared.fp8_activations:
            continue
        if (product := of[number, "linear_fc2"]).before is swiglu:
            product.maker, product.source = SwiGLU(), of[number, "linear_fc1"]
        for norm, place, again in (
            (layer.input_layernorm, "linear_qkv", layer.recompute_input_layernorm),
            (layer.pre_mlp_layernorm, "linear_fc1", layer.recompute_pre_mlp_layernorm),
        ):
            product = of[number, place]
            if type(norm) is KernelRMSNorm and not again and not product.linear.sequence_parallel:
                product.maker = Norm(norm)
                vars(norm)["forward"] = _left_to_others


def _left_to_others(x: Tensor) -> Tensor:
    return x


def _there(made: Codes | None) -> Codes:
    assert made is not None, "a matrix is multiplied in a way in which it was not quantised"
    return made
