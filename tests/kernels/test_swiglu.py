"""SwiGLU, and with the layer behind it, against float64 and composed of torch's ops; and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks import kernel_trials
from benchmarks.live_bytes import LiveBytes
from megatron_davinci.kernels import swiglu as ops
from megatron_davinci.kernels.swiglu import swiglu, swiglu_linear
from tests.cases import cases


def a_case(device="cpu", rows=6, width=24, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(rows, 2 * width, generator=g), torch.randn(10, width, generator=g)
    return x.to(device, dtype), weight.to(device, dtype)


def composed(x, weight):
    gate, up = x.chunk(2, -1)
    return F.linear(F.silu(gate) * up, weight)


def test_products_and_gradients_are_float64s_but_for_rounding(device):
    @cases(12)
    @given(st.integers(0, 2**31))
    def on_any_shape(seed):
        worst = kernel_trials.TRIALS["swiglu"](seed, device)
        assert worst.ratio <= 1, worst

    on_any_shape()


@pytest.mark.parametrize("with_main", [False, True])
def test_with_the_layer_behind_it_it_is_what_torch_composes(device, with_main):
    x, weight = a_case(device)
    right = [one.double().requires_grad_() for one in (x, weight)]
    composed(*right).square().sum().backward()
    leaf, parameter = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if with_main:
        parameter.main_grad = torch.ones_like(weight)
    out = swiglu_linear(leaf * 1, parameter)
    torch.testing.assert_close(out.double(), composed(*right), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), right[0].grad, atol=1e-4, rtol=1e-5)
    found = parameter.main_grad - 1 if with_main else parameter.grad
    torch.testing.assert_close(found.double(), right[1].grad, atol=1e-4, rtol=1e-5)
    assert getattr(parameter, "grad_added_to_main_grad", False) == with_main


def test_the_gradient_is_where_the_rows_were_and_the_product_is_not_kept(device):
    x, weight = a_case(device, rows=512, width=64)
    leaf = x.clone().requires_grad_()
    made = leaf * 1
    seen = []
    made.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    with LiveBytes() as live:
        live.count(made, weight)
        before = live.now
        out = swiglu_linear(made, weight)
        kept = live.now - before - out.numel() * out.element_size()
    assert kept < 1000
    place = made.data_ptr()
    out.sum().backward()
    assert seen == [place]


def test_large_gates_are_bounded_and_what_is_no_number_stays_in_its_place(device):
    x, _ = a_case(device, rows=4, width=4)
    x[0, :4] = torch.tensor([-math.inf, math.inf, -3e38, 3e38])
    x[1, 1], x[2, 5] = math.nan, math.nan
    leaf = x.clone().requires_grad_()
    out = swiglu(leaf)
    out.sum().backward()
    right = F.silu(x[:, :4].double()) * x[:, 4:].double()
    assert torch.equal(out.isnan(), right.isnan())
    assert torch.equal(out[0, 2:].detach().sign(), right[0, 2:].float().sign()) and out[0, 2] == 0
    assert leaf.grad[3].isfinite().all() and leaf.grad.isnan().sum() == 2 + 1 + 2 + 2 - 1


def test_rows_that_cannot_be_overwritten_are_refused():
    x, weight = a_case()
    for wrong, message in (
        (x.clone().requires_grad_(), "a leaf that wants a gradient"),
        (x.t().contiguous().t(), "not contiguous"),
        (x[:, :-1].contiguous(), "floats of two halves"),
        (x.long(), "floats of two halves"),
        (x.bfloat16(), "the weight is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            swiglu_linear(wrong, weight)


def test_a_second_backward_is_refused(device):
    x, weight = a_case(device)
    loss = swiglu_linear(x.requires_grad_() * 1, weight).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(device, rows):
    x, weight = a_case(device, rows=rows)
    weight.requires_grad_()
    out = swiglu_linear(x.requires_grad_() * 1, weight)
    out.sum().backward()
    assert out.shape == (rows, 10) and x.grad.shape == x.shape and weight.grad.any() == bool(rows)


def test_opcheck(device):
    x, _ = a_case(device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    by = torch.randn(6, 24, device=device)
    torch.library.opcheck(ops.forward.made, (x,), test_utils=tests)
    torch.library.opcheck(ops.backward.made, (by, x), test_utils=tests)
    torch.library.opcheck(ops.backward_again_.made, (by, x), test_utils=tests)


def test_with_the_norm_and_rotary_positions_it_compiles_as_one_graph():
    from megatron_davinci.kernels.rms_norm import add_rms_norm, rms_norm
    from megatron_davinci.kernels.rope import Heads, rotate_, rotation_table

    g = torch.Generator().manual_seed(3)
    case = [torch.randn(*shape, generator=g) for shape in ((6, 48), (6, 48), (48,), (10, 24))]
    table = rotation_table(torch.randn(6, 8, generator=g))

    def whole(a, b, weight, behind):
        normal, total = add_rms_norm(a, b, weight, 1e-6)
        turned = rotate_(rms_norm(normal, weight, 1e-6), table, Heads(2, 3, 2), bias=weight)
        return swiglu_linear(turned * total, behind).square().sum() + swiglu(total).sum()

    plain, compiled = ([one.clone().requires_grad_() for one in case] for _ in range(2))
    whole(*plain).backward()
    torch._dynamo.reset()
    torch.compile(whole, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
