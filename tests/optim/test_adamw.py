"""GroupAdamW is torch's AdamW with its step in the group, which is what Megatron-Core's optimizer is written for."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_davinci.optim.adamw import GroupAdamW


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, steps, seed=1, skip=()):
    """Random gradients; `skip` names (step, parameter) pairs that have none."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for index, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if (step, index) in skip else gradient
        optimizer.step()
    return [p.detach().clone() for p in params]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=2), min_size=1, max_size=4),
    lr=st.sampled_from([0.0, 1e-4, 1e-2]),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-8, 1e-5]),
)
def test_it_takes_the_steps_of_torchs_adamw_to_the_bit(shapes, lr, betas, weight_decay, eps):
    options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    ours = train(GroupAdamW(parameters(shapes), **options), 20)
    fused = train(torch.optim.AdamW(parameters(shapes), fused=True, **options), 20)
    plain = train(torch.optim.AdamW(parameters(shapes), foreach=False, **options), 20)
    for mine, theirs, reference in zip(ours, fused, plain, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_the_comparison_above_can_fail():
    shapes = [[5]]
    ours = train(GroupAdamW(parameters(shapes), lr=1e-2, weight_decay=0.1), 20)
    theirs = train(torch.optim.AdamW(parameters(shapes), lr=1e-2, weight_decay=0.0, fused=True), 20)
    assert not torch.equal(ours[0], theirs[0])


def test_groups_have_their_own_settings_and_steps():
    a, b = parameters([[3], [4]])
    optimizer = GroupAdamW(
        [{"params": [a], "lr": 1e-2}, {"params": [b], "lr": 0.0, "weight_decay": 0.5, "step": 10}]
    )
    before = b.detach().clone()
    train(optimizer, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 13]
    assert torch.equal(b.detach(), before), "a learning rate of 0 moves nothing"


def test_the_step_is_a_number_in_the_group_and_not_in_the_state():
    optimizer = GroupAdamW(parameters([[3], [2, 2]]))
    train(optimizer, 4)
    assert optimizer.param_groups[0]["step"] == 4
    for state in optimizer.state.values():
        assert sorted(state) == ["exp_avg", "exp_avg_sq"]


def test_a_saved_state_goes_on_as_if_it_had_not_been_saved():
    through = GroupAdamW(parameters([[3], [2, 2]]), lr=1e-2)
    train(through, 5)
    saved = copy.deepcopy(through.state_dict())
    weights = [p.detach().clone() for p in through.param_groups[0]["params"]]
    expected = train(through, 5, seed=2)

    resumed = GroupAdamW([torch.nn.Parameter(weight) for weight in weights], lr=9.0)
    resumed.load_state_dict(saved)
    assert all(map(torch.equal, train(resumed, 5, seed=2), expected))
    assert resumed.param_groups[0]["step"] == 10


def test_a_lost_step_would_show():
    through = GroupAdamW(parameters([[3]]), lr=1e-2)
    train(through, 5)
    saved = copy.deepcopy(through.state_dict())
    weights = [p.detach().clone() for p in through.param_groups[0]["params"]]
    expected = train(through, 5, seed=2)
    saved["param_groups"][0]["step"] = 0
    resumed = GroupAdamW([torch.nn.Parameter(weight) for weight in weights])
    resumed.load_state_dict(saved)
    assert not torch.equal(train(resumed, 5, seed=2)[0], expected[0])


def test_empty_shards_and_missing_gradients_are_passed_over():
    shapes = [[0], [3], [2]]
    optimizer = GroupAdamW(parameters(shapes), lr=1e-2)
    untouched = optimizer.param_groups[0]["params"][2]
    before = untouched.detach().clone()
    after = train(optimizer, 3, skip={(step, 2) for step in range(3)})
    assert after[0].numel() == 0
    assert torch.equal(untouched.detach(), before) and untouched not in optimizer.state
    alone = GroupAdamW(parameters([[0]]))
    train(alone, 2)
    assert alone.param_groups[0]["step"] == 2, "ranks whose shard is empty still count"


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="decoupled"):
        GroupAdamW(parameters([[1]]), adam_w_mode=False)
    with pytest.raises(ValueError, match="closure"):
        GroupAdamW(parameters([[1]])).step(lambda: 0.0)
