"""Norms behind the blocks, and one norm over all heads: as the formula in float64, and the same on every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_davinci.config import check_layout, validate
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.platform import backends
from megatron_davinci.platform.backends import Package, choose_backends
from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

HEADS, CHANNELS = 4, 6


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def over_all_heads(tensor: int) -> tuple[Any, Any, Any]:
    """On a rank: what the norm gives, and the gradients of its input and weight along random numbers."""
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from megatron_davinci.model.heads_norm import AllHeadsRMSNorm
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    distributed.start(choose("cpu", threads=1), tensor=tensor)
    rank = parallel_state.get_tensor_model_parallel_rank()
    norm = AllHeadsRMSNorm(SimpleNamespace(params_dtype=torch.float32), CHANNELS, 1e-5, heads=HEADS)
    # Else the gradient's norm would count the first rank's part alone.
    assert norm.weight.tensor_model_parallel is (tensor > 1)
    with torch.no_grad():
        norm.weight.copy_(drawn(HEADS * CHANNELS, seed=1).chunk(tensor)[rank])
    x, along = (drawn(5, 2, HEADS, CHANNELS, seed=seed).chunk(tensor, 2)[rank] for seed in (2, 3))
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * along).sum().backward()
    distributed.stop()
    return out.detach().numpy(), x.grad.numpy(), norm.weight.grad.numpy()


def formula() -> tuple[Any, Any, Any]:
    x, along = (drawn(5, 2, HEADS, CHANNELS, seed=seed).double() for seed in (2, 3))
    weight = drawn(HEADS * CHANNELS, seed=1).double().requires_grad_()
    x.requires_grad_()
    flat = x.flatten(-2)
    out = (flat / (flat.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).view(x.shape)
    (out * along).sum().backward()
    return out.detach().numpy(), x.grad.numpy(), weight.grad.numpy()


@pytest.mark.parametrize("tensor", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_a_norm_over_all_heads_is_the_formula_whoever_has_the_heads(tensor):
    parts = run_ranks(tensor, over_all_heads, tensor)
    for found, expected, axis in zip(zip(*parts, strict=True), formula(), (2, 2, 0), strict=True):
        np.testing.assert_allclose(np.concatenate(found, axis=axis), expected, rtol=2e-5, atol=2e-6)


def whole(parallel: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    behind = {"norm_placement": "post", "qk_norm": True, "qk_norm_scope": "all_heads", "qkv_bias": False}
    return small.settings(
        model={"num_layers": 2, **behind, **model},
        parallel={"device": "cpu", **(parallel or {})},
        train={"precision": "fp32", "micro_batch_size": 2},
    )


LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "TP2xPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "TP2xDP2, sharded optimizer": (4, {"tensor": 2, "distributed_optimizer": True}),
}
SHORT = ("TP2+SP",)


def take(settings: dict[str, Any]) -> Any:
    return take_all(settings, masked=True)


@pytest.fixture(scope="module")
def one_rank() -> Any:
    settings = {
        "both": whole(),
        "before": whole(norm_placement="pre"),
        "each head": whole(qk_norm_scope="head"),
        "recomputed": whole() | {"train": {**whole()["train"], "recompute": {"granularity": "full"}}},
    }
    return run_ranks(1, take, settings)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in LAYOUTS]
)
def test_every_layout_takes_the_steps_of_one_rank(name, one_rank):
    ranks, parallel = LAYOUTS[name]
    for taken in run_ranks(ranks, take, {"both": whole(parallel)}):
        for part in ("losses", "norms"):
            assert getattr(taken["both"], part) == pytest.approx(getattr(one_rank["both"], part), rel=1e-5)


def test_they_are_other_models_and_recomputing_them_changes_nothing(one_rank):
    both = one_rank["both"]
    assert both.losses == one_rank["recomputed"].losses and both.norms == one_rank["recomputed"].norms
    for other in ("before", "each head"):
        assert both.losses[-1] != pytest.approx(one_rank[other].losses[-1], rel=1e-6)


# ---- what is refused


def test_what_does_not_go_together_is_refused():
    for changes, said in (
        ({"qk_norm": False}, "needs qk_norm: true"),
        ({"experts": {"number": 4, "top_k": 2}}, "for layers of one MLP, not of experts"),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(whole(**changes), "test")
    settings = whole()
    settings["train"]["recompute"] = {"granularity": "selective", "modules": ["layernorm"]}
    with pytest.raises(ConfigError, match=r"model\.norm_placement is post"):
        validate(settings, "test")


def test_more_tensor_ranks_than_key_heads_are_refused():
    config = validate(whole({"tensor": 4}), "test")
    with pytest.raises(
        ConfigError, match=r"num_query_groups \(2\) is not a multiple of parallel.tensor \(4\)"
    ):
        check_layout(config, 4)
    check_layout(validate(whole({"tensor": 4}, qk_norm_scope="head"), "test"), 4)


def test_transformer_engines_layers_are_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(backends, "_find", lambda name, module: Package(True, "there"))
    needs = validate(whole(), "test").backend_arguments()
    chosen = choose_backends(on_cuda=True, **needs)
    assert chosen.layers.name == chosen.norm.name == "local" and "norm_placement: post" in chosen.layers.why
    with pytest.raises(EnvironmentProblem, match="qk_norm_scope: all_heads is in our own layers only"):
        choose_backends(on_cuda=True, **{**needs, "layers": "transformer_engine"})
