"""RMSNorm with and without a residual against float64, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kernel_trials
from benchmarks.kernel_bounds import Worst
from benchmarks.memory_bound_trials import RMSNorm
from megatron_davinci.kernels import rms_norm as norms
from megatron_davinci.kernels.rms_norm import add_rms_norm, rms_norm
from tests.cases import cases

EPS = 1e-6
WIDTHS = [
    8,
    37,
    512,
    2048,
    4104,
]  # by warps, by elements, by warps, by a vector a thread, too wide to be kept


def a_case(device="cpu", rows=3, width=64, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, residual, weight = (
        torch.randn(*shape, generator=g) for shape in ((rows, width), (rows, width), (width,))
    )
    return [one.to(device, dtype) for one in (x, residual, weight)]


def taken(x, residual, weight):
    """What comes out, and the gradients of a sum of both."""
    leaves = [one.clone().requires_grad_() for one in (x, residual, weight)]
    normal, total = add_rms_norm(*leaves, EPS)
    return normal, total, *torch.autograd.grad((normal.square().sum() + total.sum()), leaves)


def test_rows_and_gradients_are_float64s_but_for_rounding(device):
    @cases(8)
    @given(st.integers(0, 2**31))
    def on_any_shape(seed):
        worst = kernel_trials.TRIALS["rms_norm"](seed, device)
        assert worst.ratio <= 1, worst

    on_any_shape()


def test_the_bounds_see_a_wrong_number():
    x, by, weight = a_case(width=900)
    exact = RMSNorm(x, weight, EPS, by, None)
    for name in ("normal", "by_x", "by_weight"):
        numbers, bound = getattr(exact, name), getattr(exact, f"bound_{name}")
        for change, caught in ((0.9, False), (1.1, True)):
            wrong = numbers.clone()
            wrong.view(-1)[-1] += change * bound.reshape(-1)[-1]
            worst = Worst()
            worst.see(name, wrong, numbers, bound)
            assert (worst.ratio > 1) == caught
        assert bound.max() < 1e-4


@pytest.mark.parametrize("width", WIDTHS)
def test_the_same_bits_from_run_to_run_in_whatever_order_threads_run(device, width, monkeypatch):
    case = a_case(device, rows=11, width=width, dtype=torch.bfloat16)
    found = []
    for seed in range(2):
        monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(seed))
        found.append(taken(*case))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_sum_is_what_is_normalised_and_torchs(device):
    x, residual, weight = a_case(device, dtype=torch.bfloat16)
    normal, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normal, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("part", [0, 1])
def test_one_gradient_of_two_is_enough(device, part):
    leaves = [one.requires_grad_() for one in a_case(device)]
    whole = torch.autograd.grad(add_rms_norm(*leaves, EPS)[part].sum(), leaves, allow_unused=True)
    plain = leaves[0].double() + leaves[1].double()
    if part == 0:
        plain = torch.nn.functional.rms_norm(plain, plain.shape[-1:], leaves[2].double(), EPS)
    by_x, by_residual, by_weight = torch.autograd.grad(plain.sum(), leaves, allow_unused=True)
    torch.testing.assert_close(whole[0], by_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[1], by_residual, atol=1e-5, rtol=1e-5)
    assert (whole[2] is None) == (by_weight is None) == bool(part)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_no_numbers_is_no_other_rows(device, width):
    x, residual, weight = a_case(device, rows=4, width=width)
    x[1, width // 2], x[2, 0] = math.nan, math.inf
    normal, _, by_x, _, _ = taken(x, residual, weight)
    clean = [0, 3]
    assert normal[clean].isfinite().all() and by_x[clean].isfinite().all()
    assert normal[1].isnan().all() and not normal[2].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(device, rows):
    normal, total, by_x, _, by_weight = taken(*a_case(device, rows=rows))
    assert normal.shape == total.shape == by_x.shape == (rows, 64) and by_weight.any() == bool(rows)


def test_rows_that_do_not_lie_one_behind_the_other(device):
    x, _, weight = a_case(device, rows=8)
    part = x.view(2, 4, 64).transpose(0, 1)
    assert torch.equal(rms_norm(part, weight, EPS), rms_norm(x, weight, EPS).view(2, 4, 64).transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, w: (x, r, w[:3]), r"the weight is \[3\] for rows of \[3, 64\]"),
        (lambda x, r, w: (x, r[:2], w), r"the residual is \[2, 64\]"),
        (lambda x, r, w: (x, r, w.bfloat16()), "the weight torch.bfloat16"),
        (lambda x, r, w: (x, r.double(), w), "the residual torch.float64"),
        (lambda x, r, w: (x.long(), r.long(), w.long()), "rows are torch.int64"),
        (lambda x, r, w: (x[:, :0], r[:, :0], w[:0]), r"rows of \[3, 0\]"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        add_rms_norm(*change(*a_case()), EPS)


@pytest.mark.parametrize("added", [False, True])
def test_opcheck(device, added):
    x, residual, weight = a_case(device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (x, residual if added else None, weight, EPS)
    torch.library.opcheck(norms.forward.made, arguments, test_utils=tests)
    scale = norms.forward(*arguments)[2]
    arguments = (residual, residual if added else None, x, weight, scale)
    torch.library.opcheck(norms.backward.made, arguments, test_utils=tests)
