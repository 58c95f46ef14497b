"""A linear layer of Megatron-Core whose three products are of few bits, and what all of a rank's share.

Only the products differ from Megatron-Core's (`three_products`). Embedding, output layer, norms, softmax and the
optimizer are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.kernels.main_gradient import MainGradient
from megatron_davinci.kernels.swiglu import swiglu
from megatron_davinci.model.three_products import ThreeProducts
from megatron_davinci.precision import noise, products, scaling
from megatron_davinci.precision.recipes import Recipe
from megatron_davinci.precision.saved import keeping
from megatron_davinci.precision.scaling import Lost, Quantized, Quantizer

PLACES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers of a layer."""

OPERANDS = ("input", "weight", "gradient")
"""What they multiply."""

Tensors = tuple[Tensor, ...]


@dataclass
class Shared:
    """What the linear layers of a rank share, set before a step or a micro-batch.

    Attributes:
        recipe: How operands are quantised.
        seed: Of stochastic rounding.
        length: Tokens of a sequence.
        forward: Whether products of the forward pass are of few bits at present.
        backward: Whether those of gradients are.
        samples: [batch] int64, the global numbers of the micro-batch's samples; None where nobody said them.
        positions: [positions on this rank] int64, where its tokens stand in their sequences; None for all in order.
        fp8_activations: Whether what the backward pass needs is kept in 8 bits.
        keep_codes: Whether transposed codes are made in the forward pass and kept for the backward pass.
        watching: Whether what is lost is counted in this step.
        learning: Whether this is a step, whose largest numbers count, and no evaluation.
    """

    recipe: Recipe
    seed: int
    length: int
    forward: bool = True
    backward: bool = True
    samples: Tensor | None = None
    positions: Tensor | None = None
    fp8_activations: bool = False
    keep_codes: bool = False
    watching: bool = False
    learning: bool = False


@dataclass(eq=False)
class LowPrecisionProduct:
    """The products of one linear layer, emulated; stands for its `_forward_impl`.

    What an operand is, is this class's own: `precision.scaling.Quantized` here, codes in `native_product`.

    Args:
        shared: What all of them share.
        layer: Number of the layer in the whole model, from 0.
        place: Which of its linear layers.
        linear: Megatron-Core's module.
        original: Its own `_forward_impl`, for what is not of few bits.
        before: Makes the input of what the module is given; None for the same.
        sharded_input: Whether tensor ranks have parts of the input's channels, and the whole of the output's.

    Attributes:
        amax: [3] fp32, the largest numbers of this step's operands here, as `OPERANDS` has them.
        known: The largest numbers of earlier steps on all ranks; None for an operand of which there are none.
        lost: For each operand, the sums of what was lost of it: [underflow, overflow, 1], and the smallest scale.
    """

    shared: Shared
    layer: int
    place: str
    linear: Any
    original: Callable[..., Tensor]
    before: Callable[[Tensor], Tensor] | None
    sharded_input: bool
    amax: Tensor = field(default_factory=lambda: torch.zeros(len(OPERANDS)))
    known: list[Tensor | None] = field(default_factory=lambda: [None] * len(OPERANDS))
    lost: Tensor = field(default_factory=lambda: torch.zeros(len(OPERANDS), 4))

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        """What Megatron-Core calls with its arguments.

        Args:
            input: [positions on this rank, batch, in].
            weight: [out, in], this rank's part.
            bias: [out] or None.
            how: `allreduce_dgrad`, `sequence_parallel`, `gradient_accumulation_fusion` and others.

        Returns:
            [positions, batch, out].
        """
        if self.before is not None:
            input = self.before(input)
        if not (self.shared.forward or self.shared.backward):
            return self.original(input=input, weight=weight, bias=bias, **how)
        gathers, reduces = bool(how.get("sequence_parallel")), bool(how.get("allreduce_dgrad"))
        out: Tensor = ThreeProducts.apply(input, weight, None, self, None, gathers, reduces, None)
        return out if bias is None else out + bias

    def remember(self, largest: Tensor, there: Sequence[bool]) -> None:
        """Make scales of these from now on.

        Args:
            largest: [3] fp32 on this rank's device, as `OPERANDS` has them.
            there: Of which operands there are any.
        """
        self.known = [one if here else None for one, here in zip(largest.unbind(), there, strict=True)]

    @property
    def name(self) -> str:
        """As in `layers.3.linear_fc1`."""
        return f"layers.{self.layer}.{self.place}"

    @property
    def keeps_codes(self) -> bool:
        """Whether the input is kept as it was multiplied. Attention keeps what `linear_proj` is given itself."""
        shared = self.shared
        return shared.fp8_activations and shared.forward and shared.backward and self.place != "linear_proj"

    def input(self, x: Tensor, *, both: bool = False) -> Any:
        """The input as `forward_product` multiplies it; `both`: for `weight_gradient` too, if that can be."""
        return self._quantized(x.float(), self.shared.recipe.input, 0, sharded=self.sharded_input)

    def forward_product(self, a: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`x wᵀ`: [tokens, in] and [out, in] to [tokens, out]."""
        b = self._quantized(weight.detach().float(), self.shared.recipe.weight, 1, sharded=True)
        return self.product(a, b, dtype)

    def input_gradient(self, by_out: Any, g: Tensor, weight: Tensor) -> Tensor:
        """`g w`: [tokens, out] and [out, in] to [tokens, in]."""
        recipe, forward = self.shared.recipe, self.shared.forward
        a = by_out or self.gradient(g)
        if recipe.weight_back.transposes:
            b = self._quantized(
                weight.detach().float(), recipe.weight_back, 1, sharded=True, seen=forward
            ).t()
        else:
            turned = weight.detach().t().contiguous().float()
            b = self._quantized(turned, recipe.weight_back, 1, sharded=True, seen=forward)
        return self.product(a, b, g.dtype)

    def gradient(self, g: Any) -> Any:
        """The gradient of the outputs as `input_gradient` multiplies it."""
        how = self.shared.recipe.gradient
        drawn = self._noise(g.shape[0], how, "gradient")
        return self._quantized(g.float(), how, 2, sharded=not self.sharded_input, drawn=drawn)

    def weight_gradient(self, by_out: Any, g: Tensor, x: Any) -> tuple[Any, Any]:
        """The operands of `gᵀ x`, both with tokens last: [out, tokens] and [in, tokens]."""
        recipe = self.shared.recipe
        if by_out is not None and recipe.gradient_back.transposes and recipe.gradient_back == recipe.gradient:
            a = by_out.t()
        else:
            drawn = self._noise(g.shape[0], recipe.gradient_back, "gradient for weights")
            turned = g.t().contiguous().float()
            a = self._quantized(
                turned,
                recipe.gradient_back,
                2,
                sharded=not self.sharded_input,
                seen=True,
                drawn=None if drawn is None else drawn.t().contiguous(),
            )
        if isinstance(x, Quantized):
            return a, x.t()
        b = self._quantized(
            x.t().contiguous().float(),
            recipe.input_back,
            0,
            sharded=self.sharded_input,
            seen=self.shared.forward,
        )
        return a, b

    def _quantized(
        self,
        x: Tensor,
        how: Quantizer,
        operand: int,
        *,
        sharded: bool,
        seen: bool = False,
        drawn: Tensor | None = None,
    ) -> Quantized:
        """An operand. `seen`: it was quantised in the forward pass, and is not counted twice."""
        shared = self.shared
        known = self.known[operand]
        # One scale of a tensor is of all its parts; with blocks each rank has whole ones.
        whole = (how.blocks == "tensor" and how.scale != "none" and known is None) or how.scale == "e4m3"
        out = scaling.quantize(
            x,
            how,
            amax=known,
            largest=partial(largest_of, self._holders(operand, sharded)) if whole else None,
            noise=drawn,
            watch=shared.watching and shared.learning and not seen,
        )
        if shared.learning and not seen:
            torch.maximum(self.amax[operand], out.amax, out=self.amax[operand])
            self.count(operand, out.lost)
        return out

    def count(self, operand: int, lost: Lost | None) -> None:
        """Add what an operand has lost, where somebody looked."""
        if lost is not None:
            row = self.lost[operand]
            row[:3] += torch.stack([lost.underflow, lost.overflow, row.new_ones(())])
            row[3] = torch.where(row[2] > 1, torch.minimum(row[3], lost.scale), lost.scale)

    def kept_input(self, codes: Tensor, inverse: Tensor) -> Any:
        """The input, of codes that were kept."""
        return Quantized(codes.float(), inverse, tuple(codes.shape), inverse, codes.dtype)

    def for_backward(self, quantized: Any) -> Tensors | None:
        """What `weight_gradient` takes of the input, made in the forward pass; None where it is made again."""
        return None

    def kept_for_backward(self, kept: Tensors) -> Any:
        """The same, of what was kept."""
        raise NotImplementedError("nothing is made for the backward pass")

    def own_codes(self, quantized: Any) -> tuple[Tensor, Tensor]:
        """Codes and inverse scale of an input that is kept."""
        assert quantized.dtype is not None, "only FP8 is kept in 8 bits"
        return quantized.values.to(quantized.dtype), quantized.inverse

    def product(self, a: Any, b: Any, dtype: torch.dtype) -> Tensor:
        """`a bᵀ`, of operands as this class makes them."""
        return products.emulated(a, b, dtype)

    def add_to(self, main: MainGradient, a: Any, b: Any) -> None:
        """Add `a bᵀ` to a weight's gradient."""
        main.add_product(self.product(a, b, torch.float32))

    @property
    def _ranks(self) -> int:
        return int(self.linear.tp_group.size())

    def _holders(self, operand: int, sharded: bool) -> Any:
        """The ranks that have parts of an operand: of its channels, and of a sequence; None where there is one."""
        shares_sequence = operand != 1 and parallel_state.get_context_parallel_world_size() > 1
        shares_channels = sharded and self._ranks > 1
        if shares_sequence and shares_channels:
            return parallel_state.get_tensor_and_context_parallel_group()
        if shares_sequence:
            return parallel_state.get_context_parallel_group()
        return self.linear.tp_group if shares_channels else None

    def _noise(self, tokens: int, how: Quantizer, what: str) -> Tensor | None:
        """[tokens, out on this rank], of the numbers of tokens and of outputs in the whole model."""
        if how.rounding != "stochastic":
            return None
        shared, device = self.shared, self.linear.weight.device
        outputs = self._outputs().to(device)
        positions = shared.positions
        if shared.samples is None:
            rows = torch.arange(tokens, device=device)
        else:
            batch = len(shared.samples)
            if positions is None:
                positions = torch.arange(tokens // batch, device=device)
            rows = (positions.to(device)[:, None] + shared.samples.to(device) * shared.length).flatten()
        return noise.uniform(noise.key(shared.seed, self.layer, f"{self.place} {what}"), rows, outputs)

    def _outputs(self) -> Tensor:
        """The numbers of this rank's outputs in the whole layer."""
        here = self.linear.weight.shape[0]
        if self.sharded_input or self._ranks == 1:
            return torch.arange(here)
        # SwiGLU's two halves are each divided among ranks.
        parts = getattr(self.linear.weight, "partition_stride", 1)
        part, rank = here // parts, self.linear.tp_group.rank()
        one = torch.arange(part) + rank * part
        return torch.cat([one + number * part * self._ranks for number in range(parts)])


def largest_of(group: Any, mine: Tensor) -> Tensor:
    """Of all ranks of a group; of this one where there is none. Infinite where it is none of a rank's."""
    if group is None:
        return mine
    # Collectives take a number for larger than NaN, or not, as ranks are ordered.
    largest = mine.masked_fill(mine.isnan(), torch.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def attach(
    chunks: Sequence[Any],
    shared: Shared,
    *,
    layers: range,
    fused_swiglu: bool,
    kind: type[LowPrecisionProduct] = LowPrecisionProduct,
) -> list[LowPrecisionProduct]:
    """Give the linear layers of model chunks products of few bits.

    Args:
        chunks: This rank's model chunks.
        shared: What all of them share.
        layers: Numbers of the layers that get them; the others stay.
        fused_swiglu: Whether MLPs leave their activation to the second linear layer.
        kind: Whose products they get.

    Returns:
        Theirs, by layer and place.
    """
    found: list[LowPrecisionProduct] = []
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            if number not in layers:
                continue
            for place in PLACES:
                owner = layer.self_attention if place in PLACES[:2] else layer.mlp
                linear = getattr(owner, place)
                fused = fused_swiglu and place == "linear_fc2"
                original = type(linear)._forward_impl.__get__(linear) if fused else linear._forward_impl
                linear._forward_impl = product = kind(
                    shared,
                    number,
                    place,
                    linear,
                    original,
                    swiglu if fused else None,
                    sharded_input=place in ("linear_proj", "linear_fc2"),
                )
                found.append(product)
            if shared.fp8_activations:
                norms = [layer.input_layernorm, layer.pre_mlp_layernorm]
                if (behind := getattr(layer.self_attention.linear_proj, "post_layernorm", None)) is not None:
                    norms = [behind]  # and the MLP has its own inside
                for module in (*norms, layer.mlp):
                    module.forward = keeping(module.forward, lambda: shared.forward and shared.backward)
    return found


def side_by_side(products: Sequence[LowPrecisionProduct], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay out what products note, so that one operation clears it for all, or takes it from all.

    Returns:
        `amax` [products, 3] and `lost` [products, 3, 4] of all of them.
    """
    amax = torch.zeros(len(products), len(OPERANDS), device=device)
    lost = torch.zeros(len(products), len(OPERANDS), 4, device=device)
    for row, product in enumerate(products):
        product.amax, product.lost = amax[row], lost[row]
    return amax, lost
