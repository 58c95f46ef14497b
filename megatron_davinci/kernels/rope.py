"""Rotary positions of packed queries, keys and values, in place, and the bias that is added before.

RoFormer, Su et al., 2021, arXiv 2104.09864. A token has groups of heads as Megatron-Core packs them: the queries of a
group, its key and its value. The first `rotated` heads of a group turn. Channel i turns with channel
`channels / 2 + i`, by the angle of one row of a table of fp32 cosines and sines. Backward turns gradients back, and
sums them over tokens to the gradient of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels.column_sums import parts, sum_columns
from megatron_davinci.kernels.operators import operator
from megatron_davinci.kernels.ways import Way, way_of

_OP = "rope"
_BLOCKS = 132  # of the kernel that sums, at most: one for each multiprocessor of an H100


@dataclass(frozen=True)
class Cut:
    """How a kernel's work is cut.

    Attributes:
        passes: Of a warp over a token, as the kernel has them.
        tokens: Of a block: some for each of its warps,
        fewest: or fewer, down to one for each,
        blocks: where blocks would be fewer than an H100 runs at once.
    """

    passes: int
    tokens: int
    fewest: int
    blocks: int


CUTS = {"rope": Cut(5, 8, 8, 264), "rope_bias": Cut(1, 20, 4, 1056), "rope_sums": Cut(5, 8, 8, 132)}


@dataclass(frozen=True)
class Heads:
    """How a token's channels are laid out.

    Attributes:
        groups: Groups of heads.
        heads: Heads of a group.
        rotated: How many of them turn: the first ones.
    """

    groups: int
    heads: int
    rotated: int


def rotation_table(angles: Tensor) -> Tensor:
    """Cosines and sines of angles, as `rotate_` takes them.

    Args:
        angles: [..., channels] fp32, the second half of which repeats the first, as Megatron-Core's are.

    Returns:
        The same shape, fp32: cosines of the first half of the channels, and behind them their sines.
    """
    first = angles[..., : angles.shape[-1] // 2].float()
    return torch.cat([first.cos(), first.sin()], -1)


def rotate_(
    x: Tensor, table: Tensor, heads: Heads, *, bias: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Add the bias, and turn heads, in place.

    Args:
        x: [..., channels of a token] bf16 or fp32, contiguous; kernels compute in fp32. Nobody else needs it as it
            was.
        table: [places, channels of a head] fp32, from `rotation_table`.
        heads: Their layout.
        bias: [channels of a token] of the dtype of `x`.
        positions: [...] int64, the row of the table for each token, which a GPU does not check; default: tokens are
            places by batch, so that the rows of the table are each for `tokens / places` tokens one behind the other.

    Returns:
        `x`.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together; on a CPU: the table has no such row.
    """
    _check(x, table, heads, bias, positions)
    flat = None if positions is None else positions.reshape(-1).contiguous()
    table = table.reshape(-1, table.shape[-1]).contiguous()
    if not torch.is_grad_enabled():
        rotated_(x, bias, table, flat, heads.groups, heads.heads, heads.rotated)
        return x
    turned: Tensor = _Rotate.apply(x, bias, table, flat, heads)
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, table: Tensor, positions: Tensor | None, heads: Heads
    ) -> Tensor:
        rotated_(x, bias, table, positions, heads.groups, heads.heads, heads.rotated)
        ctx.mark_dirty(x)
        ctx.save_for_backward(table, positions)
        ctx.heads = heads
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        table, positions = ctx.saved_tensors
        heads = (ctx.heads.groups, ctx.heads.heads, ctx.heads.rotated)
        by_x, by_bias = backward(by_out.contiguous(), table, positions, *heads, ctx.needs_input_grad[1])
        return by_x, by_bias if ctx.needs_input_grad[1] else None, None, None, None


@operator(
    "davinci::rope_",
    mutates_args={"x"},
    schema="(Tensor(a!) x, Tensor? bias, Tensor table, Tensor? positions, int groups, int heads, int rotated) -> ()",
)
def rotated_(
    x: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor | None,
    groups: int,
    heads: int,
    rotated: int,
) -> None:
    """Add the bias and turn heads.

    Args:
        x: [..., channels of a token] bf16 or fp32.
        bias: [channels of a token], or None.
        table: [places, channels of a head] fp32.
        positions: [tokens] int64, or None.
        groups: Groups of heads.
        heads: Heads of a group.
        rotated: Those that turn.
    """
    way = way_of(_OP, *(one for one in (x, bias, table, positions) if one is not None))
    if way.has_kernels:
        if x.numel():
            shape = _Shape(x, table, groups, heads, rotated)
            kernel = "rope" if bias is None else "rope_bias"
            chunks = shape.chunks(kernel, x, table, *(() if bias is None else (bias,)))
            share = shape.shares(kernel, chunks, way)
            given = (x, x, _or_null(bias), table, _or_null(positions), 0, 1.0, *shape.numbers(), share)
            way.launch(kernel, share * chunks, x, *given)
        return
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # x itself, where it is as wide
    if bias is not None:
        wide += bias
    _turn_(wide, table, positions, groups, heads, rotated, 1.0)
    if wide is not x:
        x.copy_(wide)


@operator(
    "davinci::rope_backward",
    mutates_args=(),
    schema="(Tensor by_out, Tensor table, Tensor? positions, int groups, int heads, int rotated, bool biased)"
    " -> (Tensor, Tensor)",
)
def backward(
    by_out: Tensor,
    table: Tensor,
    positions: Tensor | None,
    groups: int,
    heads: int,
    rotated: int,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    """Turn gradients back.

    Args:
        by_out: [..., channels of a token] bf16 or fp32.
        table: [places, channels of a head] fp32.
        positions: [tokens] int64, or None.
        groups: Groups of heads.
        heads: Heads of a group.
        rotated: Those that turn.
        biased: Whether the gradient of a bias is wanted.

    Returns:
        The gradient of what came in, of the shape of `by_out`; and [channels of a token] that of the bias, empty
        where it is not wanted.
    """
    channels = by_out.shape[-1]
    way = way_of(_OP, *(one for one in (by_out, table, positions) if one is not None))
    if not way.has_kernels:
        by_x = by_out.to(torch.promote_types(by_out.dtype, torch.float32), copy=True)
        _turn_(by_x, table, positions, groups, heads, rotated, -1.0)
        sums = by_x.reshape(-1, channels).sum(0) if biased else by_x.new_empty(0)
        return by_x.to(by_out.dtype), sums.to(by_out.dtype)
    by_x = torch.empty_like(by_out)
    if not by_out.numel():
        return by_x, by_out.new_zeros(channels if biased else 0)
    by_bias = by_out.new_empty(channels if biased else 0)
    shape = _Shape(by_out, table, groups, heads, rotated)
    kernel = "rope_sums" if biased else "rope"
    chunks = shape.chunks(kernel, by_out, table)
    share = shape.shares(kernel, chunks, way)
    shares: Tensor | int = 0
    if biased:
        share = max(1, parts(way, share * chunks, _BLOCKS) // chunks)
        shares = by_out.new_empty((share, channels), dtype=torch.float32)
    given = (by_out, by_x, 0, table, _or_null(positions), shares, -1.0, *shape.numbers(), share)
    way.launch(kernel, share * chunks, by_out, *given)
    if isinstance(shares, Tensor):
        sum_columns(way, shares, by_bias)
    return by_x, by_bias


@rotated_.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor | None,
    groups: int,
    heads: int,
    rotated: int,
) -> None:
    return None


@backward.register_fake
def _(
    by_out: Tensor,
    table: Tensor,
    positions: Tensor | None,
    groups: int,
    heads: int,
    rotated: int,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(by_out), by_out.new_empty(by_out.shape[-1] if biased else 0)


class _Shape:
    """What the kernel is told of a tensor, and how its work is cut."""

    def __init__(self, x: Tensor, table: Tensor, groups: int, heads: int, rotated: int) -> None:
        self._tokens = x.numel() // x.shape[-1]
        self._batch = max(1, self._tokens // len(table))
        self._groups, self._heads, self._rotated = groups, heads, rotated
        self._half = table.shape[-1] // 2

    def chunks(self, kernel: str, *tensors: Tensor) -> int:
        """Warps that a token's channels are for."""
        wide = 16 // tensors[0].element_size()
        if self._half % wide or any(one.data_ptr() % 16 for one in tensors):
            wide = 1
        of_head = self._half // wide
        passes = 1 if wide == 1 or 32 % of_head else CUTS[kernel].passes
        return max(1, -(-self._groups * self._heads * of_head // (32 * passes)))

    def shares(self, kernel: str, chunks: int, way: Way) -> int:
        """How many ways tokens are parted, where nothing is summed."""
        cut = CUTS[kernel]
        found = max(
            -(-self._tokens // cut.tokens), min(-(-self._tokens // cut.fewest), -(-cut.blocks // chunks))
        )
        return parts(way, found, found)  # emulated blocks are few

    def numbers(self) -> tuple[int, ...]:
        """As the kernel takes them."""
        return self._tokens, self._batch, self._groups, self._heads, self._rotated, self._half


def _or_null(tensor: Tensor | None) -> Tensor | int:
    return 0 if tensor is None else tensor


def _turn_(
    wide: Tensor, table: Tensor, positions: Tensor | None, groups: int, heads: int, rotated: int, sign: float
) -> None:
    """In fp32 or wider, in place."""
    tokens, half = wide.numel() // wide.shape[-1], table.shape[-1] // 2
    turned = wide.view(tokens, groups, heads, 2, half)[:, :, :rotated]
    if positions is not None:
        table = table[positions]
    elif tokens != len(table):
        table = table.repeat_interleave(tokens // len(table), 0)
    cosine, sine = table.view(tokens, 1, 1, 2, half).split(1, -2)
    by_sine_low, by_sine_high = (turned * (sine if sign > 0 else -sine)).unbind(-2)
    turned.mul_(cosine)
    low, high = turned.unbind(-2)
    low.sub_(by_sine_high)
    high.add_(by_sine_low)


def _check(x: Tensor, table: Tensor, heads: Heads, bias: Tensor | None, positions: Tensor | None) -> None:
    channels = table.shape[-1]
    if table.dim() < 2 or channels % 2 or table.dtype != torch.float32:
        raise ValueError(
            f"the table is {table.dtype} {list(table.shape)}: fp32 rows of cosines and sines are expected"
        )
    expected = heads.groups * heads.heads * channels
    if not 0 <= heads.rotated <= heads.heads or x.dim() < 1 or x.shape[-1] != expected:
        raise ValueError(
            f"a token of {list(x.shape)} has not the {expected} channels of {heads} and {list(table.shape)}"
        )
    if not x.is_contiguous():
        raise ValueError("what is rotated in place is not contiguous")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias is {bias.dtype} {list(bias.shape)} for tokens of {x.dtype} {list(x.shape)}"
        )
    if positions is not None and (positions.shape != x.shape[:-1] or positions.dtype != torch.int64):
        raise ValueError(
            f"positions are {positions.dtype} {list(positions.shape)} for tokens of {list(x.shape)}"
        )
    places = table.numel() // channels
    tokens = x.numel() // max(1, x.shape[-1])
    if tokens >= 2**31 or expected >= 2**31:
        raise ValueError(
            f"{tokens} tokens of {expected} channels: fewer than 2^31 of each can be rotated at once"
        )
    if positions is None and (places == 0 or tokens % places):
        raise ValueError(
            f"{tokens} tokens are no multiple of the table's {places} places, and have no positions"
        )
    for name, tensor in (("the table", table), ("the bias", bias), ("positions", positions)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"tokens are on {x.device}, {name} on {tensor.device}")
    if positions is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = positions[(positions < 0) | (positions >= places)]
        if len(outside):
            raise ValueError(f"a position is {int(outside[0])}, and the table has rows 0 to {places - 1}")
