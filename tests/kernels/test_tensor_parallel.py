"""The vocabulary split over ranks: the whole one's losses and gradient, and the same training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks import kernel_trials
from megatron_davinci.kernels import compilers
from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

TOKENS, WIDTH = 41, 48  # 7 rows of the vocabulary are padding, all of them of the last rank


def a_batch(dtype):
    g = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(6, WIDTH, generator=g)).to(dtype)
    labels = torch.randint(TOKENS, (6,), generator=g)
    labels[1], labels[3] = -100, TOKENS - 1
    return logits, labels, torch.rand(6, generator=g), torch.randn(2, 6, generator=g)


def by_ranks(tensor, all_ways, settings):
    """Losses and this rank's gradients, by way and dtype, run twice; then steps of a model with each loss."""
    from megatron.core import parallel_state

    from megatron_davinci.kernels import ways
    from megatron_davinci.kernels.cross_entropy import vocab_parallel_cross_entropy
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    distributed.start(choose("cpu", threads=1), tensor=tensor)
    group = parallel_state.get_tensor_model_parallel_group()
    found = []
    for way, dtype, _ in itertools.product(all_ways, (torch.float32, torch.bfloat16), range(2)):
        with ways.using(way):
            logits, labels, weights, by = a_batch(dtype)
            leaf = logits.chunk(tensor, -1)[group.rank()].clone().requires_grad_()
            losses = vocab_parallel_cross_entropy(
                leaf * 1, labels, group=group, tokens=TOKENS, z_loss=0.01, weights=weights
            )
            ((losses.cross_entropy * by[0]).sum() + (losses.z_loss * by[1]).sum()).backward()
            both = torch.stack([losses.cross_entropy, losses.z_loss]).detach()
            found.append((both.numpy(), leaf.grad.float().numpy()))
    parallel_state.destroy_model_parallel()
    return found, take_all(settings, masked=True)


LOSSES = {
    "megatron": {"loss": "megatron"},
    "in place": {"loss": "davinci"},
    # Not a divisor of a micro-batch's 32 tokens, so that the last chunk is a part of one.
    "in chunks": {"loss": "davinci", "loss_chunk_tokens": 12},
}


def settings(tensor, z_loss, tied=True):
    return {
        name: small.settings(
            model={"num_layers": 1, "tie_embeddings": tied},
            parallel={"device": "cpu", "tensor": tensor, "sequence": tensor > 1},
            backends=backends,
            train={"precision": "fp32", "micro_batch_size": 2, "z_loss": z_loss},
        )
        for name, backends in LOSSES.items()
    }


@pytest.mark.parametrize(
    ("tensor", "z_loss"),
    [
        (2, 0.01),
        pytest.param(1, 0.0, marks=pytest.mark.long),
        pytest.param(1, 0.01, marks=pytest.mark.long),
        pytest.param(2, 0.0, marks=pytest.mark.long),
        pytest.param(4, 0.01, marks=pytest.mark.long),
    ],
)
@pytest.mark.needs("emulator")
def test_ranks_have_the_whole_vocabularys_losses_gradients_and_steps(tensor, z_loss):
    all_ways = ("reference", "emulator")
    compilers.emulator()  # once, not by all ranks at once
    ranks = run_ranks(tensor, by_ranks, tensor, all_ways, settings(tensor, z_loss))
    for number, (_, dtype) in enumerate(itertools.product(all_ways, (torch.float32, torch.bfloat16))):
        logits, labels, weights, by = a_batch(dtype)
        exact = kernel_trials.CrossEntropy(logits, labels, TOKENS, 0.01, weights, by)
        first = [found[2 * number] for found, _ in ranks]
        for losses, _ in first:
            assert np.array_equal(losses, first[0][0]), "every rank has the same losses"
        worst = kernel_trials.Worst()
        worst.see("losses", torch.from_numpy(first[0][0]), exact.losses, exact.bound_losses)
        gradient = torch.from_numpy(np.concatenate([gradient for _, gradient in first], -1))
        worst.see("gradient", gradient, exact.gradient, exact.bound_gradient)
        assert worst.ratio <= 1, worst
        for found, _ in ranks:
            for one, two in zip(found[2 * number], found[2 * number + 1], strict=True):
                assert np.array_equal(one, two), "the same bits from run to run"
    for _, taken in ranks:
        for name in ("in place", "in chunks"):
            for part in ("losses", "norms", *(["z_losses"] if z_loss else [])):
                expected = getattr(taken["megatron"], part)
                assert getattr(taken[name], part) == pytest.approx(expected, rel=1e-5), name
