"""How fast norms, rotary positions and SwiGLU are on a GPU at the size of the report's model, beside others' kernels.

16,384 tokens in bf16: 4 sequences of 4,096 of a model with hidden size 2,048, 16 query heads and 2 groups of 128
channels, and an inner width of 11,008. Bytes are those that have to move: each input read once and each output
written once. Rivals are timed forward and backward through autograd, and ours the same way beside them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.kernels import rms_norm as norms
from megatron_davinci.kernels import rope as ropes
from megatron_davinci.kernels import swiglu as gates

SEQUENCE, BATCH, HIDDEN, WIDTH = 4096, 4, 2048, 11008
GROUPS, QUERIES, CHANNELS = 2, 8, 128  # queries of a group
TOKENS = SEQUENCE * BATCH
EPS = 1e-6

Seconds = Callable[..., float]
Measured = tuple[dict[str, float], dict[str, Any]]


def measure(device: torch.device, copy: float, seconds: Seconds) -> Measured:
    """Times and fractions of a copy's bandwidth, and what rivals took.

    Args:
        device: The GPU.
        copy: Bytes a second that a copy reads and writes.
        seconds: Takes the median time of an action.
    """
    figures: dict[str, float] = {}
    peer: dict[str, Any] = {}
    for op in (add_rms_norm, rope, swiglu):
        timed, rivals = op(device, copy, seconds)
        figures |= timed
        peer[op.__name__] = rivals
        torch.cuda.empty_cache()
    return figures, peer


def add_rms_norm(device: torch.device, copy: float, seconds: Seconds) -> Measured:
    """Two reads and two writes forward; three and one backward."""
    x, residual, by_normal, by_total = (_rows(HIDDEN, device) for _ in range(4))
    weight = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    _, total, scale = norms.forward(x, residual, weight, EPS)
    moved = 4 * x.numel() * x.element_size()
    plain = seconds(lambda: norms.forward(x, None, weight, EPS))
    figures = _timed(
        "add_rms_norm",
        copy,
        (moved, seconds(lambda: norms.forward(x, residual, weight, EPS))),
        (moved, seconds(lambda: norms.backward(by_normal, by_total, total, weight, scale))),
    )
    figures |= {
        "rms_norm_forward_ms": 1e3 * plain,
        "rms_norm_forward_fraction_of_copy": moved / 2 / plain / copy,
    }
    leaves = [one.clone().requires_grad_() for one in (x, residual, weight)]

    def eager(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        both = a + b
        return F.rms_norm(both, (HIDDEN,), w, EPS), both

    rivals = {
        "ours": lambda a, b, w: norms.add_rms_norm(a, b, w, EPS),
        "torch_eager": eager,
        "torch_compile": torch.compile(eager),
    }
    if _has_liger():
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        rivals["liger"] = lambda a, b, w: LigerFusedAddRMSNormFunction.apply(a, b, w, EPS)
    return figures, _raced(rivals, leaves, (by_normal, by_total), seconds)


def rope(device: torch.device, copy: float, seconds: Seconds) -> Measured:
    """One read and one write of packed queries, keys and values, with their bias, and with its gradient."""
    heads = ropes.Heads(GROUPS, QUERIES + 2, QUERIES + 1)
    width = GROUPS * heads.heads * CHANNELS
    x, by_out = (_rows(width, device) for _ in range(2))
    bias = torch.zeros(width, device=device, dtype=torch.bfloat16)
    frequencies = 1e6 ** -(torch.arange(CHANNELS // 2, device=device) / (CHANNELS // 2))
    angles = torch.outer(torch.arange(SEQUENCE, device=device).float(), frequencies)
    angles = torch.cat([angles, angles], -1)
    table, layout = ropes.rotation_table(angles), (heads.groups, heads.heads, heads.rotated)
    moved = 2 * x.numel() * x.element_size()
    figures = _timed(
        "rope",
        copy,
        (moved, seconds(lambda: ropes.rotated_(x, bias, table, None, *layout))),
        (moved, seconds(lambda: ropes.backward(by_out, table, None, *layout, True))),
    )
    alone = moved * heads.rotated / heads.heads
    no_bias = seconds(lambda: ropes.rotated_(x, None, table, None, *layout))
    figures |= {
        "rope_without_bias_ms": 1e3 * no_bias,
        "rope_without_bias_fraction_of_copy": alone / no_bias / copy,
    }

    # Rivals get queries and keys apart, of one sequence after the other, as they want them.
    shape = (BATCH, SEQUENCE)
    queries = torch.randn(*shape, GROUPS * QUERIES, CHANNELS, device=device, dtype=torch.bfloat16).transpose(
        1, 2
    )
    keys = torch.randn(*shape, GROUPS, CHANNELS, device=device, dtype=torch.bfloat16).transpose(1, 2)
    cosine, sine = (part.to(torch.bfloat16).unsqueeze(0) for part in (angles.cos(), angles.sin()))
    leaves = [one.requires_grad_() for one in (queries, keys)]
    gradients = tuple(torch.randn_like(one) for one in leaves)

    def half_turned(t: Tensor) -> Tensor:
        low, high = t.chunk(2, -1)
        return torch.cat([-high, low], -1)

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        c, s = cosine.unsqueeze(1), sine.unsqueeze(1)
        return tuple(t * c + half_turned(t) * s for t in (q, k))

    packed = x.detach().view(SEQUENCE, BATCH, width).requires_grad_()

    def ours(q: Tensor) -> tuple[Tensor]:
        return (ropes.rotate_(q * 1, table, heads, bias=bias),)

    rivals = {"torch_eager": eager, "torch_compile": torch.compile(eager)}
    if _has_liger():
        from liger_kernel.ops.rope import LigerRopeFunction

        rivals["liger"] = lambda q, k: LigerRopeFunction.apply(q * 1, k * 1, cosine, sine)
    peer = _raced(rivals, leaves, gradients, seconds)
    # A product before it makes what may be overwritten: ours and Liger's work in place.
    return figures, peer | _raced({"ours_packed": ours}, [packed], (by_out.view_as(packed),), seconds)


def swiglu(device: torch.device, copy: float, seconds: Seconds) -> Measured:
    """Two reads and a write forward; three reads and two writes backward, and one more for the product again."""
    x, by_out = _rows(2 * WIDTH, device), _rows(WIDTH, device)
    one = by_out.numel() * by_out.element_size()
    figures = _timed(
        "swiglu",
        copy,
        (3 * one, seconds(lambda: gates.forward(x))),
        (5 * one, seconds(lambda: gates.backward(by_out, x))),
    )
    place = x.clone()
    again = seconds(lambda: gates.backward_again_(by_out, place), prepare=lambda: place.copy_(x))
    figures |= {
        "swiglu_backward_again_ms": 1e3 * again,
        "swiglu_backward_again_fraction_of_copy": 6 * one / again / copy,
    }
    leaf = x.requires_grad_()

    def eager(rows: Tensor) -> tuple[Tensor]:
        gate, up = rows.chunk(2, -1)
        return (F.silu(gate) * up,)

    rivals = {
        "ours": lambda rows: (gates.swiglu(rows),),
        "torch_eager": eager,
        "torch_compile": torch.compile(eager),
    }
    peer = _raced(rivals, [leaf], (by_out,), seconds)
    if _has_liger():
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        halves = [half.detach().contiguous().requires_grad_() for half in x.chunk(2, -1)]
        liger = {"liger": lambda gate, up: (LigerSiLUMulFunction.apply(gate, up),)}
        peer |= _raced(liger, halves, (by_out,), seconds)
    return figures, peer


def _rows(width: int, device: torch.device) -> Tensor:
    return torch.randn(TOKENS, width, device=device, dtype=torch.bfloat16)


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _timed(
    name: str, copy: float, forward: tuple[int, float], backward: tuple[int, float]
) -> dict[str, float]:
    figures = {}
    for way, (moved, taken) in (("forward", forward), ("backward", backward)):
        figures[f"{name}_{way}_ms"] = 1e3 * taken
        figures[f"{name}_{way}_fraction_of_copy"] = moved / taken / copy
    return figures


def _raced(
    rivals: dict[str, Callable[..., Any]],
    leaves: list[Tensor],
    gradients: tuple[Tensor, ...],
    seconds: Seconds,
) -> dict[str, Any]:
    """Forward and backward of each; what one cannot do is said in its place."""
    found: dict[str, Any] = {} if _has_liger() else {"liger": "not installed"}
    for name, act in rivals.items():
        try:
            # Autograd and others' wrappers take the host a millisecond, longer than some of this takes the GPU.
            taken = seconds(lambda act=act: torch.autograd.grad(act(*leaves), leaves, gradients), ahead=8)
        except Exception as error:  # whatever another's kernel or compiler raises
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        found[f"{name}_forward_and_backward_ms"] = 1e3 * taken
    return found
