"""A weight's gradient in its fp32 sum: the first product writes it, where it is known to be zero."""

from __future__ import annotations

import pytest
import torch

from megatron_davinci.kernels.main_gradient import MainGradient
from megatron_davinci.platform.weight_gradient import mark_zero

ROWS, OUT, IN = 12, 5, 7


def a_weight(known: bool, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """One whose sum holds ones; where it is said to be zero, whoever reads it comes out wrong."""
    weight = torch.nn.Parameter(torch.zeros(OUT, IN, dtype=dtype))
    weight.main_grad = torch.ones(OUT, IN)
    if known:
        mark_zero(weight.main_grad)
    return weight


def products(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randn(ROWS, width, generator=generator).to(dtype) for width in (OUT, IN))
        for _ in range(2)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [False, True])
def test_only_the_first_product_writes(known, dtype):
    weight, expected = a_weight(known, dtype), torch.zeros(OUT, IN) if known else torch.ones(OUT, IN)
    for by_out, inputs in products(dtype):  # two micro-batches
        main = MainGradient(weight)
        main.add(by_out, inputs)
        main.gradient()
        expected += by_out.float().t() @ inputs.float()
    torch.testing.assert_close(weight.main_grad, expected)


@pytest.mark.parametrize("known", [False, True])
def test_so_does_what_was_multiplied_elsewhere(known):
    weight, made = a_weight(known), torch.full((OUT, IN), 3.0)
    for _ in range(2):
        MainGradient(weight).add_product(made)
    assert torch.equal(weight.main_grad, made * 2 + (0 if known else 1))


def test_a_sum_that_is_zero_is_given_away_once():
    main = MainGradient(weight := a_weight(True))
    assert main.take_zero() is weight.main_grad and main.take_zero() is None
    assert MainGradient(weight).take_zero() is None and MainGradient(a_weight(False)).take_zero() is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_sum_of_its_own_is_that_of_its_products(count):
    weight, expected = torch.nn.Parameter(torch.zeros(OUT, IN)), torch.zeros(OUT, IN)
    main = MainGradient(weight)
    for by_out, inputs in products()[:count]:
        main.add(by_out, inputs)
        expected += by_out.t() @ inputs
    torch.testing.assert_close(main.gradient(), expected)
