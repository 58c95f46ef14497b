"""Cross entropy in place against float64, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kernel_trials
from megatron_davinci.errors import DataError
from megatron_davinci.kernels import cross_entropy_passes as passes
from megatron_davinci.kernels import ways
from megatron_davinci.kernels.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from tests.cases import cases


def a_case(device="cpu", rows=3, width=37, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, width, generator=g)).to(device, dtype)
    return logits, torch.randint(width, (rows,), generator=g).to(device)


def taken(logits, labels, **options):
    """Losses and the gradient of their sum."""
    leaf = logits.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf * 1, labels, **options)
    (losses.cross_entropy.sum() + (0 if losses.z_loss is None else losses.z_loss.sum())).backward()
    return losses, leaf.grad


def test_losses_and_gradients_are_float64s_but_for_rounding(device):
    @cases(15)
    @given(st.integers(0, 2**31))
    def on_any_shape(seed):
        worst = kernel_trials.cross_entropy(seed, device)
        assert worst.ratio <= 1, worst

    on_any_shape()


@pytest.mark.parametrize("size", [50.0, 1e5, 1e9, 1e30, 2e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_logit_far_above_all_others_has_all_of_the_probability(size, dtype, device):
    # Exactly, however large it is: differences are taken before they are multiplied.
    logits = torch.full((3, 300), -size / 2, dtype=dtype, device=device)
    labels = torch.tensor([7, 7, IGNORED], device=device)
    logits[0, 7] = logits[1, 200] = logits[2, 0] = size
    losses, gradient = taken(logits, labels)
    apart = float(logits[1, 200].double() - logits[1, 7].double())
    assert losses.cross_entropy.tolist() == [0, pytest.approx(apart, rel=1e-6), 0]
    expected = torch.zeros(3, 300, device=device)
    expected[1, 7], expected[1, 200] = -1, 1
    torch.testing.assert_close(gradient.float(), expected, rtol=0, atol=1e-30)


@pytest.mark.parametrize("seed", [1338312, 18886816, 21127893, 23337294])
def test_cases_whose_logits_are_all_minus_infinity(seed, device):
    # Rows with a loss, without one, and with padding: zeros are exact, what is no number is none on both sides.
    worst = kernel_trials.cross_entropy(seed, device)
    assert worst.ratio <= 1, worst


def test_a_bound_that_is_no_number_bounds_nothing():
    worst = kernel_trials.Worst()
    worst.see("a number", torch.zeros(2), torch.zeros(2), torch.tensor([1.0, float("nan")]))
    assert worst.ratio == float("inf")


def test_the_bounds_see_a_wrong_number():
    # One ulp more than roundings explain is seen; so is one element of many.
    logits, labels = a_case(rows=2, width=900)
    by = torch.ones(2, 2)
    exact = kernel_trials.CrossEntropy(logits, labels, 900, 0.01, None, by)
    for name in ("losses", "gradient"):
        numbers, bound = getattr(exact, name).clone(), getattr(exact, f"bound_{name}")
        for change, caught in ((0.9, False), (1.1, True)):
            wrong = numbers.clone()
            wrong.view(-1)[-1] += change * bound.reshape(-1)[-1]
            worst = kernel_trials.Worst()
            worst.see(name, wrong, numbers, bound)
            assert (worst.ratio > 1) == caught
    assert exact.bound_losses.max() < 1e-4 and exact.bound_gradient.max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run_in_whatever_order_threads_run(device, dtype, monkeypatch):
    logits, labels = a_case(device, rows=7, width=1500, dtype=dtype)
    found = []
    for seed in range(3):
        monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(seed))
        losses, gradient = taken(logits, labels, z_loss=0.1)
        found.append((losses.cross_entropy, losses.z_loss, gradient))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_logits_become_the_gradient_where_they_are(device):
    logits, labels = a_case(device)
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    place = made.data_ptr()
    loss = vocab_parallel_cross_entropy(made, labels).cross_entropy
    one_hot = torch.nn.functional.one_hot(labels, 37)
    torch.testing.assert_close(made.detach(), logits.softmax(-1) - one_hot)
    seen = []
    made.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss.sum().backward()
    assert seen == [place]


def test_logits_are_left_alone_where_no_gradient_is_wanted(device):
    logits, labels = a_case(device)
    before = logits.clone()
    vocab_parallel_cross_entropy(logits, labels)
    with torch.no_grad():
        vocab_parallel_cross_entropy(logits.requires_grad_(), labels)
    assert torch.equal(logits.detach(), before)


def test_logits_that_are_no_numbers_make_their_rows_loss_none_and_no_others(device):
    logits, labels = a_case(device, rows=4)
    logits[0, 5], logits[1, 6], logits[2, :] = math.nan, math.inf, -math.inf
    losses, gradient = taken(logits, labels)
    assert losses.cross_entropy.isfinite().tolist() == [False, False, False, True]
    clean, clean_gradient = taken(logits[3:], labels[3:])
    assert torch.equal(clean.cross_entropy, losses.cross_entropy[3:])
    assert torch.equal(clean_gradient, gradient[3:])


def test_an_ignored_row_of_no_numbers_has_no_loss_and_no_gradient(device):
    logits, labels = a_case(device)
    logits[1], labels[1] = math.nan, IGNORED
    losses, gradient = taken(logits, labels, z_loss=0.1)
    assert losses.cross_entropy[1] == losses.z_loss[1] == 0 and not gradient[1].any()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(device, rows):
    losses, gradient = taken(*a_case(device, rows=rows))
    assert losses.cross_entropy.shape == (rows,) and gradient.shape == (rows, 37)


@pytest.mark.parametrize("label", [-1, 37, 2**40])
def test_a_label_that_is_no_token(device, label):
    logits, labels = a_case(device)
    labels[1] = label
    if device.type == "cpu":
        with pytest.raises(DataError, match=r"label at \[1\] of \[3\][^$]*\n.*" + str(label)):
            vocab_parallel_cross_entropy(logits, labels)
    _, _, target = passes.statistics(logits, labels, 0, 37, IGNORED)
    assert target.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.t().contiguous().t(), y), "not contiguous"),
        (lambda x, y: (x, y[:2]), r"labels are \[2\] for logits of \[3, 37\]"),
        (lambda x, y: (x, y.int()), "torch.int32"),
        (lambda x, y: (x.long(), y), "logits are torch.int64"),
        (lambda x, y: (x.clone().requires_grad_(), y), "leaf"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(*change(*a_case()))


def test_weights_and_padding_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"weights are \[2\]"):
        vocab_parallel_cross_entropy(*a_case(), weights=torch.ones(2))
    with pytest.raises(ValueError, match="tokens is 38"):
        vocab_parallel_cross_entropy(*a_case(), tokens=38)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
def test_weights_of_another_dtype_weigh_the_same(device, dtype):
    logits, labels = a_case(device)
    weights = torch.tensor([0.5, 0.0, 1.0], device=device).to(dtype)
    expected, found = (taken(logits, labels, weights=one, z_loss=0.1) for one in (weights.float(), weights))
    assert found[0].cross_entropy.dtype == torch.float32 and torch.equal(found[1], expected[1])
    assert torch.equal(found[0].cross_entropy, expected[0].cross_entropy)


def test_a_second_backward_is_refused(device):
    logits, labels = a_case(device)
    loss = vocab_parallel_cross_entropy(logits.requires_grad_() * 1, labels).cross_entropy.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


@pytest.mark.needs("emulator")
def test_a_dtype_without_a_kernel_runs_in_plain_torch_which_is_said_once(caplog):
    ways._declined.cache_clear()
    logits, labels = a_case(dtype=torch.float16)
    with ways.using("emulator"):
        found = [vocab_parallel_cross_entropy(logits, labels).cross_entropy for _ in range(2)]
    torch.testing.assert_close(
        found[0], torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    )
    said = [record.getMessage() for record in caplog.records]
    assert said == ["cross_entropy runs in plain torch: there is no kernel for torch.float16"]


class TestAsOpsOfTorch:
    @pytest.mark.parametrize("op", ["statistics", "gradient_", "whole_", "scaled_", "backward_"])
    def test_opcheck(self, device, op):
        logits, labels = a_case(device)
        one, two = (torch.randn(3, device=device) for _ in range(2))
        arguments = {
            "statistics": (logits, labels, 0, 30, IGNORED),
            "gradient_": (logits, labels, one, 0, 30, IGNORED),
            "whole_": (logits, labels, 30, IGNORED),
            "scaled_": (logits, labels, one, two, 0, 30, IGNORED),
            "backward_": (logits, labels, one, two, one.clone(), 0, 30, IGNORED),
        }
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(getattr(passes, op).made, arguments[op], test_utils=tests)

    def test_compiled_as_one_graph_it_is_the_same(self):
        logits, labels = a_case(dtype=torch.bfloat16)

        def whole(leaf):
            losses = vocab_parallel_cross_entropy(leaf * 1, labels, z_loss=0.1)
            return losses.cross_entropy.sum() + losses.z_loss.sum()

        plain, compiled = (logits.clone().requires_grad_() for _ in range(2))
        whole(plain).backward()
        torch._dynamo.reset()
        torch.compile(whole, backend="aot_eager", fullgraph=True)(compiled).backward()
        assert torch.equal(plain.grad, compiled.grad)
