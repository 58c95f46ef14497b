"""Trials of the ops that do little more than read and write."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernel_bounds import ROUNDING, TINY, Into, U, Worst, chance, integers, placed, size
from megatron_davinci.kernels import rms_norm as norms
from megatron_davinci.kernels.document_bounds import document_bounds
from megatron_davinci.kernels.rope import Heads, rotate_, rotation_table
from megatron_davinci.kernels.swiglu import backward_again_, swiglu

DTYPES = (torch.float32, torch.bfloat16)


def put(values: Tensor, g: torch.Generator, device: torch.device, aligned: bool) -> Tensor:
    """A tensor on a device: where 16 bytes begin, which is fast, or at a random address."""
    return values.to(device) if aligned else placed(values, g, device)


def rms_norm(seed: int, device: torch.device) -> Worst:
    """Rows and gradients of a random case, with a residual or without."""
    g = torch.Generator().manual_seed(seed)
    dtype, rows = DTYPES[integers(g, 0, 1)], integers(g, 1, (40, 200)[chance(g, 0.5)])
    width = (size(g, 5000), 8 * size(g, 600), 8 * size(g, 64))[integers(g, 0, 2)]
    rows = min(rows, max(1, 40_000 // width))
    aligned, added, along = (chance(g, p) for p in (0.7, 0.6, 0.8))
    eps = (1e-6, 1e-5, 0.5)[integers(g, 0, 2)]

    def draw(*shape: int) -> Tensor:
        scale = (1e-3, 1, 30)[integers(g, 0, 2)]
        return put((scale * torch.randn(*shape, generator=g)).to(dtype), g, device, aligned)

    x, residual, by_normal, by_total = (draw(rows, width) for _ in range(4))
    weight = draw(width)
    if chance(g, 0.2):
        x[0] = 0
    leaves = [x.clone(), residual.clone(), weight.clone()]
    if not aligned:
        leaves = [placed(leaf, g, device) for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    worst = Worst()
    if added:
        normal, total = norms.add_rms_norm(*leaves, eps)
        exact = x.double() + residual.double()
        worst.see("sum", total.detach(), exact, (ROUNDING[dtype] + 2 * U) * exact.abs())
        outputs, gradients = ([normal, total], [by_normal, by_total]) if along else ([normal], [by_normal])
        by_x, by_residual, by_weight = torch.autograd.grad(outputs, leaves, gradients)
        worst.see("gradient of the residual", by_residual, by_x, torch.zeros_like(by_x, dtype=torch.float64))
    else:
        total, along = leaves[0], False
        normal = norms.rms_norm(total, leaves[2], eps)
        by_x, by_weight = torch.autograd.grad(normal, (total, leaves[2]), by_normal)
    right = RMSNorm(total.detach(), weight, eps, by_normal, by_total if along else None)
    for name, found in (("normal", normal.detach()), ("by_x", by_x), ("by_weight", by_weight)):
        worst.see(name, found, getattr(right, name), getattr(right, f"bound_{name}"))
    return worst


class RMSNorm:
    """Normalised rows, the gradients of `sum(by_normal * normal + by_total * x)`, and what rounding may make of them.

    Args:
        x: [rows, width].
        weight: [width].
        eps: Added to the mean square.
        by_normal: [rows, width].
        by_total: The same, or None.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, eps: float, by_normal: Tensor, by_total: Tensor | None
    ) -> None:
        e = ROUNDING[x.dtype]
        rows, width = x.shape
        x, weight, above = x.double(), weight.double(), by_normal.double()
        beside = torch.zeros_like(x) if by_total is None else by_total.double()
        s = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = x * s
        self.normal = n * weight
        # What one thread adds one after the other, then a warp's lanes and a block's warps.
        steps = max(16, width / 256 + 8) + 12
        e_s = (steps + 2) / 2 * U + 3 * U
        self.bound_normal = self.normal.abs() * (e_s + 2 * U + e * (1 + 2 * e_s + 8 * U))

        a = above * weight
        along = (a * n).mean(-1, keepdim=True)
        most = (a * n).abs().mean(-1, keepdim=True)
        value = (a - n * along) * s
        self.by_x = value + beside
        e_along = most * (e_s + (steps + 4) * U)
        bound = s * (2 * a.abs() * U + n.abs() * (along.abs() * (e_s + 3 * U) + e_along))
        bound = bound + value.abs() * (e_s + 2 * U) + 2 * U * self.by_x.abs()
        self.bound_by_x = bound + e * (self.by_x.abs() + bound)

        self.by_weight = (above * n).sum(0)
        sums = (above * n).abs().sum(0) * (e_s + (rows + 4) * U)
        self.bound_by_weight = sums + e * (self.by_weight.abs() + sums)


def rope(seed: int, device: torch.device) -> Worst:
    """Heads that turn, and gradients, of a random layout, with a bias or without."""
    g = torch.Generator().manual_seed(seed)
    dtype, half = DTYPES[integers(g, 0, 1)], (size(g, 20), 8 * integers(g, 1, 8))[integers(g, 0, 1)]
    heads = Heads(integers(g, 1, 4), integers(g, 1, 8), 0)
    heads = Heads(heads.groups, heads.heads, integers(g, 0, heads.heads))
    # Tokens: several for each warp, where that is soon emulated.
    most = min(120, 30_000 // (heads.groups * heads.heads * 2 * half))
    places, batch = integers(g, 1, max(1, most // 3)), integers(g, 1, 7)
    aligned, biased, moved = chance(g, 0.7), chance(g, 0.5), chance(g, 0.5)
    channels = heads.groups * heads.heads * 2 * half
    angles = 30 * torch.randn(places, half, generator=g)
    table = put(rotation_table(torch.cat([angles, angles], -1)), g, device, aligned)
    tokens = integers(g, 1, max(1, most)) if moved else places * batch
    positions = torch.randint(places, (tokens,), generator=g).to(device) if moved else None
    x, by_out, bias = (
        put((3 * torch.randn(*shape, generator=g)).to(dtype), g, device, aligned)
        for shape in ((tokens, channels), (tokens, channels), (channels,))
    )
    leaf, place = x.clone().requires_grad_(), placed(x, g, device) if not aligned else x.clone()
    given = bias.clone().requires_grad_()
    made = rotate_(Into.apply(leaf, place), table, heads, bias=given if biased else None, positions=positions)
    gradients = torch.autograd.grad(made, (leaf, given) if biased else (leaf,), by_out)

    e, worst = ROUNDING[dtype], Worst()
    rows = table[torch.arange(tokens, device=device) // batch if positions is None else positions].double()

    def turned(of: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Exactly, and the sum of what is added up."""
        split = of.view(tokens, heads.groups, heads.heads, 2, half)
        cosine, sine = (part.view(tokens, 1, 1, half) for part in rows.chunk(2, -1))
        low, high = split[:, :, : heads.rotated].unbind(-2)
        exact, most = split.clone(), split.abs()
        exact[:, :, : heads.rotated] = torch.stack(
            [low * cosine - sign * high * sine, high * cosine + sign * low * sine], -2
        )
        most[:, :, : heads.rotated] = torch.stack(
            [(low * cosine).abs() + (high * sine).abs(), (high * cosine).abs() + (low * sine).abs()], -2
        )
        return exact.view(tokens, channels), most.view(tokens, channels)

    exact, most = turned(x.double() + (bias.double() if biased else 0), 1)
    worst.see("turned", made.detach(), exact, 3 * U * most + e * (1 + 4 * U) * exact.abs() + 4 * e * U * most)
    exact, most = turned(by_out.double(), -1)
    worst.see("by_x", gradients[0], exact, 3 * U * most + e * (1 + 4 * U) * exact.abs() + 4 * e * U * most)
    if biased:
        sums = most.sum(0) * (tokens + 4) * U
        worst.see("by_bias", gradients[1], exact.sum(0), sums + e * (exact.sum(0).abs() + sums))
    return worst


def gated(seed: int, device: torch.device) -> Worst:
    """The product and its gradients of a random case, in place and not."""
    g = torch.Generator().manual_seed(seed)
    dtype, rows = DTYPES[integers(g, 0, 1)], integers(g, 1, (40, 200)[chance(g, 0.5)])
    width = (size(g, 300), 8 * size(g, 200))[integers(g, 0, 1)]
    rows = min(rows, max(1, 20_000 // width))
    aligned = chance(g, 0.7)
    scale = (0.1, 1, 10, 60)[integers(g, 0, 3)]
    x = put((scale * torch.randn(rows, 2 * width, generator=g)).to(dtype), g, device, aligned)
    by = put(torch.randn(rows, width, generator=g).to(dtype), g, device, aligned)
    leaf = (x.clone() if aligned else placed(x, g, device)).requires_grad_()
    product = swiglu(leaf)
    (by_x,) = torch.autograd.grad(product, leaf, by)
    place = leaf.detach().clone() if aligned else placed(x, g, device)
    again = backward_again_(by, place)

    e, worst = ROUNDING[dtype], Worst()
    gate, up = x.double().chunk(2, -1)
    s, above = torch.sigmoid(gate), by.double()
    power = torch.exp(-gate.clamp(min=-700)) * s  # 1 - s
    e_power = (2 * gate.abs() + 6) * U
    e_s, e_rest = power * e_power + 3 * U, s * e_power + 4 * U
    exact = gate * s * up
    # 1 / (1 + e) may be 0 where it is below the smallest float.
    lost = 4 * TINY * (1 + gate.abs()) * (1 + up.abs()) * (1 + above.abs())
    bound = exact.abs() * (e_s + 3 * U + e * (1 + 2 * e_s)) + lost
    worst.see("product", product.detach(), exact, bound)
    worst.see("product again", again, product.detach(), torch.zeros_like(exact))
    slope = s * (1 + gate * power)
    e_slope = s * ((gate * power).abs() * (e_rest + 2 * U) + 2 * U * (1 + gate * power).abs())
    e_slope = e_slope + slope.abs() * (e_s + U)
    by_gate, by_up = above * up * slope, above * gate * s
    bound_gate = (above * up).abs() * (e_slope + 3 * U * slope.abs()) + lost
    bound_up = by_up.abs() * (e_s + 3 * U) + lost
    exact, bound = torch.cat([by_gate, by_up], -1), torch.cat([bound_gate, bound_up], -1)
    bound = bound + e * (exact.abs() + bound)
    worst.see("by_x", by_x, exact, bound)
    worst.see("by_x in place", place, by_x, torch.zeros_like(exact))
    return worst


def documents(seed: int, device: torch.device) -> Worst:
    """Documents of random sequences: right or not, since nothing is rounded."""
    g = torch.Generator().manual_seed(seed)
    shape, share = (integers(g, 1, 4), size(g, 1100)), float(torch.rand((), generator=g)) ** 4
    tokens = torch.randint(1, 9, shape, generator=g).masked_fill(torch.rand(shape, generator=g) < share, 0)
    begins = torch.ones(shape, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == 0
    places = torch.arange(shape[1])
    positions = torch.stack([places - places.masked_fill(~row, 0).cummax(0).values for row in begins])
    firsts = begins.flatten().nonzero().flatten()
    bounds = torch.full((tokens.numel() + 1,), tokens.numel())
    bounds[: len(firsts)] = firsts
    worst, out = Worst(), document_bounds(tokens.to(device), 0)
    right = (positions, bounds, torch.tensor(len(firsts)))
    for name, made, exact in zip(out._fields, out, right, strict=True):
        worst.see(name, made.cpu(), exact, torch.zeros_like(exact, dtype=torch.float64))
    return worst
