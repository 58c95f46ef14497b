"""The output layer and its loss by chunks: the losses and gradients of all at once, in little memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.kernels.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from megatron_davinci.kernels.linear_cross_entropy import linear_cross_entropy
from tests.config import small


def a_case(device="cpu", rows=11, size=16, width=70, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(rows, size, generator=g), torch.randn(width, size, generator=g)
    labels = torch.randint(width - 5, (rows,), generator=g)
    labels[3] = IGNORED
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def taken(hidden, weight, labels, by, **options):
    """Both losses, and the gradients of hidden states and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = linear_cross_entropy(hidden, weight, labels, z_loss=0.1, **options)
    ((losses.cross_entropy * by[0]).sum() + (losses.z_loss * by[1]).sum()).backward()
    return losses.cross_entropy.detach(), losses.z_loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_losses_and_gradients_are_float64s_whatever_the_chunk(device, chunk):
    hidden, weight, labels = a_case(device)
    g = torch.Generator().manual_seed(0)
    by, weights = (torch.rand(*shape, generator=g).to(device) for shape in ((2, 11), (11,)))
    found = taken(hidden, weight, labels, by, tokens=65, weights=weights, chunk=chunk)

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ w.t())[:, :65]
    log_z, keep = logits.logsumexp(-1), (labels != IGNORED) * weights
    losses = keep * (log_z - logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1))
    z_losses = keep * 0.1 * log_z.square()
    ((losses * by[0]).sum() + (z_losses * by[1]).sum()).backward()
    for mine, exact in zip(found, (losses.detach(), z_losses.detach(), x.grad, w.grad), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-5)


def test_in_bf16_losses_are_those_of_the_logits_and_the_weights_gradient_is_summed_in_fp32(device):
    hidden, weight, labels = a_case(device, rows=64, dtype=torch.bfloat16)
    by = torch.ones(2, 64, device=device)
    loss, _, _, gradient = taken(hidden, weight, labels, by, chunk=5)
    whole = vocab_parallel_cross_entropy(hidden @ weight.t(), labels).cross_entropy
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
    at_once = taken(hidden, weight, labels, by, chunk=64)[3]
    # Rounded to bf16 once, at the end: thirteen chunks differ from one by an ulp at most.
    torch.testing.assert_close(gradient, at_once, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_gradient_goes_to_the_main_gradient_where_there_is_one(device, tied):
    hidden, weight, labels = a_case(device)
    by = torch.ones(2, 11, device=device)
    expected = taken(hidden, weight, labels, by, chunk=4)[3]
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.ones_like(weight)
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = tied
    losses = linear_cross_entropy(hidden, parameter, labels, z_loss=0.1, chunk=4)
    (losses.cross_entropy.sum() + losses.z_loss.sum()).backward()
    assert parameter.grad_added_to_main_grad
    torch.testing.assert_close(parameter.main_grad, 1 + expected)
    if tied:
        assert not parameter.grad.any(), "what is added to it would count twice"


def test_it_holds_no_more_logits_than_a_chunks():
    # The report's model at a hundredth of its rows and vocabulary, its hidden size as it is.
    rows, size, width, chunk = 640, 2048, 1520, 64
    hidden, weight = torch.randn(rows, size).requires_grad_(), torch.randn(width, size).requires_grad_()
    weight.main_grad = torch.zeros(width, size)
    weight.grad_added_to_main_grad = False
    labels = torch.randint(width, (rows,))
    chunk_bytes, one_token = 4 * chunk * width, 4 * rows
    # The gradient of hidden states, and what stands for the weight's.
    beside = 4 * (rows * size + width * size)

    def most(take):
        with LiveBytes() as bytes_:
            there = bytes_.count(hidden, weight, weight.main_grad, labels)
            take()
        return bytes_.peak - there

    ours = most(
        lambda: linear_cross_entropy(hidden, weight, labels, chunk=chunk).cross_entropy.sum().backward()
    )
    # What plain torch holds of a part of a chunk is a few times the chunk; kernels hold nothing.
    assert ours <= beside + 5 * chunk_bytes + 40 * one_token
    whole = most(lambda: torch.nn.functional.cross_entropy(hidden @ weight.t(), labels).backward())
    assert whole >= 2 * 4 * rows * width > 10 * chunk_bytes


def test_weights_in_float64_weigh_the_same(device):
    hidden, weight, labels = a_case(device)
    by, weights = torch.ones(2, 11, device=device), torch.rand(11, device=device)
    expected = taken(hidden, weight, labels, by, weights=weights)
    for one, other in zip(expected, taken(hidden, weight, labels, by, weights=weights.double()), strict=True):
        assert torch.equal(one, other)


def test_no_rows(device):
    hidden, weight, labels = a_case(device, rows=4)
    found = taken(hidden[:0], weight, labels[:0], torch.ones(2, 0, device=device))
    assert found[0].shape == (0,) and found[2].shape == (0, 16) and not found[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h, w, y[:2]), r"labels are \[2\] for hidden states of \[11, 16\]"),
        (lambda h, w, y: (h, w[:, :5], y), r"the weight is \[70, 5\]"),
        (lambda h, w, y: (h, w.bfloat16(), y), "the weight torch.bfloat16"),
        (lambda h, w, y: (h, w, y.int()), "labels torch.int32"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(*a_case()))


def test_a_chunk_of_nothing_and_a_label_that_is_no_token_are_refused():
    hidden, weight, labels = a_case()
    with pytest.raises(ValueError, match="a chunk has 0 tokens"):
        linear_cross_entropy(hidden, weight, labels, chunk=0)
    labels[2] = 70
    with pytest.raises(DataError, match=r"label at \[2\]"):
        linear_cross_entropy(hidden, weight, labels)


def test_a_chunk_without_our_loss_is_refused():
    with pytest.raises(ConfigError, match="loss_chunk_tokens acts with loss: davinci; found loss: auto"):
        validate(small.settings(backends={"loss_chunk_tokens": 512}), "test")
