"""Parameters dealt to data-parallel ranks: the same steps, each rank with the state of its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.optim.dealt import owners
from tests.optim.test_muon import muon
from tests.ranks import run_ranks

EXPERTS = {"number": 4, "top_k": 2, "shared_ffn_hidden_size": 24}


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_nobody_has_more_than_the_mean_and_one_thing(sizes: list[int], ranks: int) -> None:
    found = owners(sizes, ranks)
    held = [
        sum(size for size, owner in zip(sizes, found, strict=True) if owner == rank) for rank in range(ranks)
    ]
    assert sum(held) == sum(sizes)
    assert max(held) <= sum(sizes) / ranks + max(sizes, default=0)
    assert len(sizes) < ranks or not min(sizes) or all(held)


def settings(
    precision: str, dealt: bool, experts: bool = False, clip: float = 0.0, **parallel: object
) -> dict:
    whole = muon(precision, **{**parallel, "distributed_optimizer": dealt})
    whole["optimizer"]["clip_grad_norm"] = clip
    if experts:
        whole["model"]["experts"] = EXPERTS
    return whole


def taken(cases: dict) -> dict:
    from tests.stepping import take_all

    return {name: tuple(one) for name, one in take_all(cases).items()}


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_steps_are_those_of_ranks_that_keep_everything(experts: bool) -> None:
    cases = {
        f"{precision} {dealt}": settings(precision, dealt, experts)
        for precision in ("fp32", "bf16")
        for dealt in (True, False)
    }
    ranks = run_ranks(2, taken, cases)
    for precision in ("fp32", "bf16"):
        for found in ranks:
            losses, norms, _, weights = found[f"{precision} True"]
            kept_losses, kept_norms, _, kept_weights = found[f"{precision} False"]
            assert (losses, weights) == (kept_losses, kept_weights)
            # Summed up in another order.
            assert norms == pytest.approx(kept_norms, rel=1e-6)
        assert len({found[f"{precision} True"][3] for found in ranks}) == 1


@pytest.mark.parametrize(
    ("ranks", "experts", "parallel"),
    [
        pytest.param(2, False, {"context": 2}, id="CP2", marks=pytest.mark.long),
        pytest.param(4, False, {"tensor": 2}, id="TP2xDP2"),
        pytest.param(2, True, {"expert": 2}, id="EP2"),
        pytest.param(4, False, {"pipeline": 2}, id="PP2xDP2", marks=pytest.mark.long),
        pytest.param(
            4, True, {"expert": 2, "tensor": 2, "sequence": True}, id="EP2xTP2", marks=pytest.mark.long
        ),
        pytest.param(4, True, {"expert": 2}, id="EP2xDP2", marks=pytest.mark.long),
    ],
)
def test_every_layout_takes_the_steps_of_one_rank(ranks: int, experts: bool, parallel: dict) -> None:
    [alone] = run_ranks(1, taken, {"one": settings("fp32", False, experts, 0.3)})
    for found in run_ranks(ranks, taken, {"dealt": settings("fp32", True, experts, 0.3, **parallel)}):
        for mine, theirs in zip(found["dealt"][:2], alone["one"][:2], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


def kept(whole: dict) -> tuple[dict[str, int], int]:
    """What this rank has state of, with its bytes, and how many parameters the model has."""
    from megatron_davinci.platform import distributed
    from tests.stepping import built, start

    config, platform = start(whole)
    chunks, optimizer, _ = built(config, platform)
    [part] = optimizer.chained_optimizers
    named = {getattr(p, "main_param", p): name for chunk in chunks for name, p in chunk.named_parameters()}
    found = {named[p]: sum(t.nbytes for t in state.values()) for p, state in part.optimizer.state.items()}
    assert {named[p] for group in part.optimizer.param_groups for p in group["params"]} == set(found)
    distributed.stop()
    return found, len(named)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_parameter_has_its_state_on_one_rank(precision: str) -> None:
    ranks = run_ranks(2, kept, settings(precision, True))
    names = [name for found, _ in ranks for name in found]
    assert len(names) == len(set(names)) == ranks[0][1]
    one, other = (sum(found.values()) for found, _ in ranks)
    assert 0.5 < one / other < 2
