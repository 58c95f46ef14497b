"""Trials of AdamW: one update of several tensors, moments in fp32 or in 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.kernel_bounds import U, Worst, chance, integers, placed, size
from megatron_davinci.kernels import moments, spans
from megatron_davinci.kernels.adamw import Update, adamw_, adamw_fp8_moments_

LOG2_TOP, LOG2_RANGE = math.log2(448), math.log2(448 * 512)


def adamw(seed: int, device: torch.device) -> Worst:
    """One of both kinds of moments."""
    g = torch.Generator().manual_seed(seed)
    case, worst = Case(g), Worst()
    elements = spans.ELEMENTS
    if chance(g, 0.3):
        spans.ELEMENTS = moments.GROUP * integers(g, 1, 8)
    try:
        (case.full if chance(g, 0.4) else case.eight_bits)(worst, g, device)
    finally:
        spans.ELEMENTS = elements
    return worst


class Case:
    """Tensors, and numbers of an update."""

    def __init__(self, g: torch.Generator) -> None:
        counts = [size(g, 2000) for _ in range(integers(g, 1, 4))]
        if chance(g, 0.5):
            counts.append(integers(g, 1000, 5000))  # several groups for each warp
        if chance(g, 0.02):
            counts.append(spans.ELEMENTS + integers(g, -200, 200))
        if chance(g, 0.2):
            counts.insert(integers(g, 0, len(counts)), 0)
        spread = (0.5, 2, 6)[integers(g, 0, 2)]  # powers of ten that sizes are over

        def sizes(count: int) -> Tensor:
            made = 10 ** (spread * torch.randn(count, generator=g) - 4)
            made[torch.rand(count, generator=g) < 0.1] = 0.0
            return made.clamp(max=1e10)

        self.parameters = [torch.randn(n, generator=g) for n in counts]
        self.gradients = [sizes(n) * torch.randn(n, generator=g) for n in counts]
        self.first = [sizes(n) * torch.randn(n, generator=g) for n in counts]
        self.second = [sizes(n).square() for n in counts]
        if chance(g, 0.3):  # groups of zeros, and of one size
            for values in (*self.gradients, *self.first, *self.second):
                values[:150] = 0.0
                values[300:600] = values[300:600].sign() * 1e-3
        self.update = Update(
            learning_rate=(1e-3, 0.1)[integers(g, 0, 1)],
            beta1=(0.9, 0.0)[chance(g, 0.2)],
            beta2=(0.95, 0.999)[integers(g, 0, 1)],
            epsilon=(1e-8, 1e-15)[integers(g, 0, 1)],
            weight_decay=(0.0, 0.1)[integers(g, 0, 1)],
            step=integers(g, 1, 1000),
            gradient_scale=1.0 if chance(g, 0.5) else float(torch.rand((), generator=g)),
        )
        self.copied = chance(g, 0.5)
        self.aligned = chance(g, 0.7)

    def put(self, tensors: list[Tensor], g: torch.Generator, device: torch.device) -> list[Tensor]:
        """On the device, at addresses where 16 bytes begin or at random ones."""
        return [one.to(device, copy=True) if self.aligned else placed(one, g, device) for one in tensors]

    def full(self, worst: Worst, g: torch.Generator, device: torch.device) -> None:
        """Moments in fp32."""
        given = [
            self.put(one, g, device) for one in (self.parameters, self.gradients, self.first, self.second)
        ]
        copies = self.put([one.bfloat16() for one in self.parameters], g, device) if self.copied else []
        adamw_(*given, self.update, copies)
        for n in range(len(self.parameters)):
            exact = Exact(self.parameters[n], self.gradients[n], self.first[n], self.second[n], self.update)
            worst.see("first moment", given[2][n].cpu(), exact.first, exact.bound_first)
            worst.see("second moment", given[3][n].cpu(), exact.second, exact.bound_second)
            self._see_parameter(worst, exact, given[0][n], copies[n] if copies else None)

    def eight_bits(self, worst: Worst, g: torch.Generator, device: torch.device) -> None:
        """Moments in 8 bits, encoded by plain torch before the update."""
        coded = [
            [moments.encode(one, second=number == 1) for one in tensors]
            for number, tensors in enumerate((self.first, self.second))
        ]
        codes = [[one[0] for one in tensors] for tensors in coded]
        ranges = [torch.cat([m[1], v[1]], 1) for m, v in zip(*coded, strict=True)]
        given = [self.put(one, g, device) for one in (self.parameters, self.gradients, *codes)]
        copies = self.put([one.bfloat16() for one in self.parameters], g, device) if self.copied else []
        placed_ranges = [one.to(device, copy=True) for one in ranges]
        adamw_fp8_moments_(*given, placed_ranges, self.update, copies)
        for n in range(len(self.parameters)):
            m, e_m = decoded(codes[0][n], ranges[n][:, :2])
            v, e_v = decoded(codes[1][n], ranges[n][:, 2:])
            exact = Exact(self.parameters[n], self.gradients[n], m, v, self.update, e_m, e_v)
            self._see_parameter(worst, exact, given[0][n], copies[n] if copies else None)
            found = placed_ranges[n].cpu()
            see_codes(worst, "first", given[2][n].cpu(), found[:, :2], exact.first, exact.bound_first)
            see_codes(worst, "second", given[3][n].cpu(), found[:, 2:], exact.second, exact.bound_second)

    @staticmethod
    def _see_parameter(worst: Worst, exact: Exact, found: Tensor, copy: Tensor | None) -> None:
        worst.see("parameter", found.cpu(), exact.parameter, exact.bound_parameter)
        if copy is not None:
            worst.see("bf16 copy", copy.cpu(), found.cpu().bfloat16(), torch.zeros(()))


class Exact:
    """An update in float64, and what rounding may make of it.

    Args:
        parameter: [n].
        gradient: [n].
        first: [n], before the update.
        second: [n], before the update.
        update: Its numbers.
        e_first: [n], by how much the first moment that the update began with may be off.
        e_second: [n], by how much the second may be.
    """

    def __init__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        first: Tensor,
        second: Tensor,
        update: Update,
        e_first: Tensor | float = 0.0,
        e_second: Tensor | float = 0.0,
    ) -> None:
        p, g, m, v = (one.double() for one in (parameter, gradient, first, second))
        scale, beta1, rest1, beta2, rest2, epsilon, step, correction, decay = update.factors()
        g = g * scale  # two roundings: the factor's and the product's
        self.first = beta1 * m + rest1 * g
        self.second = beta2 * v + rest2 * g.square()
        # Of each product: a factor that was rounded, the product, and for a gradient what it has; then the sum.
        self.bound_first = U * (3 * (beta1 * m).abs() + 5 * (rest1 * g).abs()) + beta1 * e_first
        self.bound_second = U * (3 * beta2 * v + 8 * rest2 * g.square()) + beta2 * e_second
        # Below the smallest normal number there are fewer bits, and the hardware may have none: its root of it is 0.
        self.bound_first += 2.0**-125
        self.bound_second += 2.0**-125
        root = self.second.sqrt()
        below = (self.second - self.bound_second).clamp(min=0).sqrt()
        # The hardware's root and inverse are off by an ulp or two, which is as many roundings doubled.
        e_root = (root - below) + 4 * U * root
        size = root * correction + epsilon
        e_size = e_root * correction + U * (4 * root * correction + 3 * epsilon)
        move = self.first / size
        e_move = self.bound_first / size + move.abs() * (e_size / (size - e_size).clamp(min=size / 2) + 6 * U)
        self.parameter = p - decay * p - step * move
        self.bound_parameter = step * (e_move + 4 * U * move.abs()) + U * (p.abs() * (3 + 4 * decay))
        self.bound_parameter += U * 2 * self.parameter.abs()


def decoded(codes: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """What codes stand for, float64, and by how much a kernel may be off."""
    top, bottom = (one.double().repeat_interleave(moments.GROUP)[: codes.numel()] for one in ranges.unbind(1))
    stored = codes.view(torch.float8_e4m3fn).double()
    octaves = (top / bottom).log2()
    power = (stored.abs().log2() - LOG2_TOP) * octaves / LOG2_RANGE
    found = torch.where(stored == 0, 0.0, torch.copysign(top * power.exp2(), stored))
    # An exponent of up to so many octaves, from logarithms that the hardware has to 2^-22; then a power, to 2^-22.
    return found, found.abs() * (2.0**-19 + 16 * U * octaves.nan_to_num(0.0, 0.0, 0.0))


def see_codes(worst: Worst, name: str, codes: Tensor, found: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Codes and ranges of moments after an update, whose exact sizes are known within a bound."""
    if not codes.numel():
        return
    missing = -codes.numel() % moments.GROUP
    sizes, by = (
        torch.nn.functional.pad(one, (0, missing)).view(-1, moments.GROUP) for one in (exact.abs(), bound)
    )
    second = name == "second"
    top = sizes.amax(1)
    alive = top >= moments.LEAST_TOP
    floor = (top * (moments.SECOND_DEPTH if second else moments.FIRST_DEPTH)).clamp(min=moments.SMALLEST)
    counts = sizes > 0 if second else sizes >= floor.unsqueeze(1)
    bottom = torch.where(counts, sizes, math.inf).amin(1)
    if second:
        bottom = torch.maximum(bottom, floor)
    bottom = torch.minimum(bottom, top / 2)
    # Any that may be the smallest may be it, with its own error.
    most = torch.where(sizes - by <= bottom.unsqueeze(1) * (1 + 1e-6), by, 0.0).amax(1)
    most = torch.maximum(
        most, by.gather(1, torch.where(counts, sizes, math.inf).argmin(1, keepdim=True)).squeeze(1)
    )
    # Of a second moment, rounding may make nothing; then it is not what is raised.
    vanishes = (sizes > 0) & (sizes <= by) & second
    # Rounding decides whether a first moment at the very floor is dropped: the smallest is then one or the other.
    at_floor = (sizes - floor.unsqueeze(1)).abs() <= by + 2 * U * floor.unsqueeze(1)
    open_ = vanishes.any(1) if second else at_floor.any(1)
    of_top = torch.where(bottom > top * 0.49, 1.0, moments.SECOND_DEPTH)  # where it follows from the top
    e_bottom = torch.where(open_, math.inf, most + by.amax(1) * of_top + 2 * U * bottom)
    worst.see(f"top of {name} moments", found[:, 0], torch.where(alive, top, 0.0), by.amax(1))
    worst.see(f"bottom of {name} moments", found[:, 1], torch.where(alive, bottom, 0.0), e_bottom)
    top, bottom = found.double().unsqueeze(1).unbind(2)
    octaves = torch.where(alive.unsqueeze(1), (top / bottom).log2(), 1.0)
    power = LOG2_RANGE / octaves
    held = torch.where(sizes > 0, torch.maximum(sizes, bottom), 0.0) if second else sizes
    stretched = torch.where(held > 0, ((held / top).log2() * power + LOG2_TOP).exp2(), 0.0)
    stretched = torch.where(alive.unsqueeze(1) & (second | (held >= bottom - by)), stretched, 0.0)
    e_size = (by / held).nan_to_num(0.0, math.inf, math.inf)
    e = stretched * ((e_size * power * 1.5).clamp(max=1e6) + (2.0**-19 + 24 * U * octaves) * power + 2.0**-18)
    e = torch.where(vanishes if second else at_floor, math.inf, e)
    half = ((stretched + e).clamp(2.0**-6, 448).log2().floor() - 4).exp2()
    stored = torch.nn.functional.pad(codes, (0, missing)).view_as(sizes)
    value = stored.view(torch.float8_e4m3fn).double()
    worst.see(f"codes of {name} moments", value.abs(), stretched, half + e)
    signs = torch.nn.functional.pad(exact.sign(), (0, missing)).view_as(sizes)
    certain = (sizes > by) & (value != 0)
    worst.see(f"signs of {name} moments", value.sign()[certain], signs[certain], torch.zeros(()))
