"""Stochastic rounding: unbiased, of either neighbour, replayed, and the same whoever holds which part."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_davinci.precision import formats
from megatron_davinci.precision.formats import E2M1, E4M3, E5M2, parse, round_to
from megatron_davinci.precision.noise import key, uniform

ROWS, COLUMNS = torch.arange(1000, 1512), torch.arange(256)


def test_noise_is_uniform_and_its_neighbours_know_nothing_of_each_other():
    u = uniform(key(1, 2, "gradient"), ROWS, COLUMNS).double()
    n = u.numel()
    assert u.min() >= 0 and u.max() < 1 and torch.equal(u * 2**24, (u * 2**24).round())
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    counts = torch.histc(u, 64, 0, 1)
    chi = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi < 63 + 5 * math.sqrt(2 * 63)
    centred = u - 0.5
    others = (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred * (uniform(key(1, 3, "gradient"), ROWS, COLUMNS).double() - 0.5),
        centred * (uniform(key(2, 2, "gradient"), ROWS, COLUMNS).double() - 0.5),
        centred * (uniform(key(1, 2, "gradient"), ROWS + (1 << 33), COLUMNS).double() - 0.5),
    )
    for other in others:
        assert abs(other.mean()) * 12 * math.sqrt(other.numel()) < 5


def test_a_part_has_the_noise_of_the_whole():
    whole = uniform(key(7, 0, "gradient"), ROWS, COLUMNS)
    part = uniform(key(7, 0, "gradient"), ROWS[100:200], COLUMNS[64:128])
    assert torch.equal(part, whole[100:200, 64:128])


@pytest.mark.parametrize("form", [E2M1, E4M3, E5M2, parse("E8M3"), parse("E7M7")], ids=lambda form: form.name)
def test_stochastic_rounding_is_unbiased(form):
    """The mean of many roundings, in units of its standard error, for numbers all over the format."""
    scale = min(form.top, 2.0**20)
    values = torch.randn(256, generator=torch.Generator().manual_seed(0)) * scale / 5
    values[:64] *= form.smallest / scale * 20 if form.exponent_bits < 8 else 1
    values = values.clamp(-form.top, form.top)
    x = values.repeat(len(ROWS), 1)
    y = round_to(x, form, "stochastic", uniform(key(5, 1, "gradient"), ROWS, COLUMNS))
    low, high, x64 = y.amin(0).double(), y.amax(0).double(), x[0].double()
    both = ((y == y.amin(0)).sum(0) > 9) & ((y == y.amax(0)).sum(0) > 9) & (low < high)
    assert both.sum() > 150
    # Of two neighbours with the right mean, the variance follows.
    deviation = ((x64 - low) * (high - x64) / len(ROWS)).sqrt()
    z = ((y.double().mean(0) - x64) / deviation)[both]
    assert z.abs().max() < 4.5 and abs(z.mean()) * math.sqrt(len(z)) < 4 and 0.8 < z.std() < 1.2
    # Each is one of its two neighbours, and what the format has stays.
    for column in (0, 100, 200):
        assert len(y[:, column].unique()) <= 2
    assert torch.equal(round_to(y, form, "stochastic", torch.full_like(y, 1 - 2.0**-24)), y)


def test_rounding_to_the_nearest_is_biased_where_stochastic_is_not():
    """So the test above can fail."""
    x = torch.full((512, 256), 0.1)
    assert (round_to(x, E2M1) == 0).all()
    share = (round_to(x, E2M1, "stochastic", uniform(key(5, 1, "g"), ROWS, COLUMNS)) == 0.5).double().mean()
    assert abs(share - 0.2) < 5 * math.sqrt(0.16 / x.numel())
    assert formats.numbers(E2M1)[1] == 0.5
