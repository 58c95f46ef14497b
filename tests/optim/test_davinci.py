"""DavinciAdamW keeps GroupAdamW's contract, with moments in fp32 or in 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.kernels import moments
from megatron_davinci.optim.adamw import GroupAdamW
from megatron_davinci.optim.davinci import DavinciAdamW, DavinciAdamWFP8Moments
from tests.cases import cases
from tests.optim.test_adamw import parameters, train
from tests.ranks import run_ranks


@cases(4)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=2), min_size=1, max_size=4),
    lr=st.sampled_from([0.0, 1e-4, 1e-2]),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-8, 1e-5]),
)
def test_200_steps_are_group_adamws_but_for_rounding(shapes, lr, betas, weight_decay, eps):
    options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    ours = train(DavinciAdamW(parameters(shapes), **options), 200)
    theirs = train(GroupAdamW(parameters(shapes), **options), 200)
    # A step is no longer than some learning rates, and has a few roundings; so has the sum.
    room = 200 * (2.0**-23 * 4 + lr * 2.0**-23 * 16)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=room)


@pytest.mark.parametrize("kind", [DavinciAdamW, DavinciAdamWFP8Moments])
class TestBothKinds:
    def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(self, kind):
        through = kind(parameters([[300], [2, 2]]), lr=1e-2)
        train(through, 5)
        saved = copy.deepcopy(through.state_dict())
        weights = [p.detach().clone() for p in through.param_groups[0]["params"]]
        expected = train(through, 5, seed=2)
        resumed = kind([torch.nn.Parameter(weight) for weight in weights], lr=9.0)
        resumed.load_state_dict(saved)
        assert all(map(torch.equal, train(resumed, 5, seed=2), expected))
        assert resumed.param_groups[0]["step"] == 10

    def test_moments_that_are_given_as_numbers_are_the_state_to_the_bit(self, kind):
        through = kind(parameters([[300], [2, 2]]), lr=1e-2)
        train(through, 5)
        params = through.param_groups[0]["params"]
        other = kind([torch.nn.Parameter(p.detach().clone()) for p in params], lr=1e-2)
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            numbers = {name: value.clone() for name, value in through.moments_of(p).items()}
            assert all(one.dtype == torch.float32 and one.shape == p.shape for one in numbers.values())
            other.set_moments(q, numbers)
            assert all(torch.equal(value, other.state[q][name]) for name, value in through.state[p].items())

    def test_the_gradients_scale_is_a_clip_coefficient(self, kind):
        clipped, scaled = (kind(parameters([[300]]), lr=1e-2) for _ in range(2))
        clipped.gradient_scale = 0.125
        gradient = torch.randn(300, generator=torch.Generator().manual_seed(3))
        for optimizer, by in ((clipped, 1), (scaled, 0.125)):
            optimizer.param_groups[0]["params"][0].grad = gradient * by
            optimizer.step()
        a, b = (one.param_groups[0]["params"][0] for one in (clipped, scaled))
        assert torch.equal(a, b)

    def test_copies_are_what_a_parameter_is_in_bf16(self, kind):
        optimizer = kind(parameters([[300], [7]]), lr=1e-2)
        first, second = optimizer.param_groups[0]["params"]
        optimizer.copies[first] = torch.zeros(300, dtype=torch.bfloat16)
        train(optimizer, 2)
        assert torch.equal(optimizer.copies[first], first.detach().bfloat16())
        alone = kind(parameters([[300], [7]]), lr=1e-2)
        assert all(map(torch.equal, train(alone, 2), (first.detach(), second.detach())))

    def test_empty_shards_and_missing_gradients_are_passed_over(self, kind):
        optimizer = kind(parameters([[0], [3], [2]]), lr=1e-2)
        untouched = optimizer.param_groups[0]["params"][2]
        before = untouched.detach().clone()
        train(optimizer, 3, skip={(step, 2) for step in range(3)})
        assert torch.equal(untouched.detach(), before)
        assert optimizer.param_groups[0]["step"] == 3

    def test_what_it_cannot_do_is_refused(self, kind):
        with pytest.raises(ValueError, match="decoupled"):
            kind(parameters([[1]]), adam_w_mode=False)
        with pytest.raises(ValueError, match="closure"):
            kind(parameters([[1]])).step(lambda: 0.0)


def test_a_state_of_the_other_kind_is_refused():
    full, coded = DavinciAdamW(parameters([[9]])), DavinciAdamWFP8Moments(parameters([[9]]))
    for optimizer in (full, coded):
        train(optimizer, 1)
    with pytest.raises(ValueError, match=r"moments are torch.uint8 in the state .* torch.float32 here"):
        full.load_state_dict(coded.state_dict())


@pytest.mark.long
def test_over_three_seeds_moments_in_8_bits_are_within_the_seeds_noise():
    (figures,) = run_ranks(1, compare, 3, 200)
    assert figures["difference_over_noise"] < 1, figures
    assert figures["state_bytes_fp32"] == 8 and figures["state_bytes_fp8"] < 2.2
    assert figures["loss_fp32"] < 2, "nothing was learnt"


def compare(seeds, steps):
    from benchmarks import optimizer_moments

    return optimizer_moments.compare("cpu", 1, seeds, steps)[0]


def test_bytes_of_state_a_parameter():
    optimizer = DavinciAdamWFP8Moments(parameters([[1280], [64, 20]]))
    optimizer.make_states()
    total = sum(one.nbytes for state in optimizer.state.values() for one in state.values())
    assert total / (2 * 1280) == 2 + 16 / moments.GROUP == 2.125


@pytest.mark.gpu
def test_on_a_gpu_moments_in_8_bits_stay_near_those_in_fp32():
    from benchmarks import optimizer_moments

    figures, _ = optimizer_moments.compare("cuda", 1, 2, 40)
    assert figures["largest_difference"] < 0.02, figures
    assert figures["loss_fp32"] < 4.7, "nothing was learnt"
