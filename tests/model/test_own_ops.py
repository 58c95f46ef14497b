"""Norms, rotary positions and SwiGLU of this package in the model: the same training, the same checkpoint."""

from __future__ import annotations

import sys

import pytest

from benchmarks import ops_on_off
from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.kernels import compilers
from megatron_davinci.platform.backends import choose_backends
from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

OPS = ("norm", "rope", "swiglu", "weight_gradient")
SEVERAL = {
    "as it is": {"model": {"qkv_bias": True}, "train": {}},
    "one group": {"model": {"num_query_groups": 1}, "train": {}},
    "norms of their own": {
        "model": {"qk_norm": True, "qkv_bias": False, "norm_placement": "post"},
        "train": {"recompute": {"granularity": "full"}},
    },
}


def settings(backends, parallel, model, train):
    return small.settings(
        model={"num_layers": 2, **model},
        parallel={"device": "cpu", **parallel},
        backends=backends,
        train={"precision": "fp32", "micro_batch_size": 2, **train},
    )


def with_kernels(way, whole):
    """`take_all` by a way, and the weights' names."""
    from megatron_davinci.kernels import ways

    with ways.using(way):
        return take_all(whole, documents=True)


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        ("as it is", {"tensor": 2, "sequence": True}),
        *(
            pytest.param(case, parallel, marks=pytest.mark.long)
            for case, parallel in (
                ("norms of their own", {"tensor": 2, "sequence": True}),
                ("one group", {"tensor": 2}),
                ("as it is", {"context": 2}),
                ("as it is", {"pipeline": 2}),
            )
        ),
    ],
)
def test_training_over_ranks_is_the_same(case, parallel):
    whole = {
        name: settings(backends, parallel, **SEVERAL[case])
        for name, backends in (("off", {}), ("on", dict.fromkeys(OPS, "davinci")))
    }
    for taken in run_ranks(2, with_kernels, "reference", whole):
        for part in ("losses", "norms"):
            assert getattr(taken["on"], part) == pytest.approx(getattr(taken["off"], part), rel=1e-5)
        assert taken["on"].weights != taken["off"].weights, "nothing of it was on"


def with_groups_in_the_batch_and_without(whole):
    """Steps both ways, and whether attention has got views of what the projection has written."""
    from megatron_davinci.model.attention import SDPAttention
    from tests.stepping import start, take

    config, platform = start(whole)
    attend, views = SDPAttention._attend, set()

    def seen(self, query, key, *rest):
        views.add(query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr())
        return attend(self, query, key, *rest)

    SDPAttention._attend, found = seen, []
    for folds in (True, False):
        SDPAttention.takes_groups_as_batch = folds
        views.clear()
        found.append((take(config, platform), set(views)))
    return found


@pytest.mark.parametrize("parallel", [{}, pytest.param({"tensor": 2}, marks=pytest.mark.long)])
def test_attention_gets_queries_where_they_lie_and_nothing_is_otherwise(parallel):
    shape = {"model": {"qkv_bias": True, "num_attention_heads": 8, "num_query_groups": 4}, "train": {}}
    whole = settings({"rope": "davinci"}, parallel, **shape)
    for (folded, views), (copied, copies) in run_ranks(
        2 if parallel else 1, with_groups_in_the_batch_and_without, whole
    ):
        assert folded == copied, "the same to the bit"
        assert (views, copies) == ({True}, {False})


def with_sums_known_as_zero_and_without(whole):
    """Steps both ways, and how many products of a step wrote a sum in place of adding to one."""
    from megatron_davinci.platform import weight_gradient
    from tests.stepping import STEPS, start, take

    config, platform = start(whole)
    mark, take_zero, found = weight_gradient.mark_zero, weight_gradient.take_zero, []
    written: list[bool] = []

    def noted(total):
        # Hooks at the end of a backward pass ask too.
        was = take_zero(total)
        if sys._getframe(1).f_code.co_name == "add_weight_gradient":
            written.append(was)
        return was

    weight_gradient.take_zero = noted
    for knows in (True, False):
        weight_gradient.mark_zero = mark if knows else lambda total: None
        written.clear()
        found.append((take(config, platform, masked=True), sum(written) / STEPS))
    return found


@pytest.mark.parametrize(
    "parallel", [{}, pytest.param({"pipeline": 2, "overlap_gradient_reduce": True}, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_first_product_writes_a_cleared_sum_and_nothing_is_otherwise(parallel, tied):
    shape = {"model": {"tie_embeddings": tied, "qkv_bias": True}, "train": {"micro_batch_size": 2}}
    whole = settings({"swiglu": "davinci", "weight_gradient": "davinci"}, parallel, **shape)
    ranks = run_ranks(2 if parallel else 1, with_sums_known_as_zero_and_without, whole)
    assert all(known == unknown for (known, _), (unknown, _) in ranks), "the same to the bit"
    # Four linear layers in each of two layers, and the last one.
    assert sum(written for (_, written), _ in ranks) == 9
    assert all(written == 0 for _, (_, written) in ranks)


def differences(way, steps, some):
    from megatron_davinci.kernels import ways

    with ways.using(way):
        return ops_on_off.differences("cpu", 3, steps, some)[0]


@pytest.mark.parametrize(
    ("way", "steps", "some"),
    [
        pytest.param("emulator", 2, ["all"], marks=pytest.mark.needs("emulator")),
        ("reference", 20, ["all"]),
        pytest.param("emulator", 20, None, marks=[pytest.mark.needs("emulator"), pytest.mark.long]),
        pytest.param("reference", 200, None, marks=pytest.mark.long),
    ],
)
def test_each_op_and_all_leave_the_losses_as_they_are(way, steps, some):
    if way == "emulator":
        compilers.emulator()
    (figures,) = run_ranks(1, differences, way, steps, some, timeout=600)
    assert 0 < figures["worst_loss_difference"] < 1e-5, figures
    assert {f"loss_difference_{op}" for op in some or (*OPS, "loss", "loss_by_chunks", "all")} <= set(figures)


def names_in_a_checkpoint(whole):
    from megatron_davinci.model.build import build_model
    from tests.stepping import start

    _, platform = start(whole[0])
    chunks = [build_model(validate(one, "test"), platform)[0] for one in whole]
    return [sorted(chunk.sharded_state_dict()) for chunk in chunks]


def test_a_checkpoint_is_the_same():
    whole = [settings(dict.fromkeys(OPS, name), {}, {}, {}) for name in ("auto", "davinci")]
    ((off, on),) = run_ranks(1, names_in_a_checkpoint, whole)
    assert off == on and any("linear_fc2.weight" in name for name in on)


class TestChoosing:
    def test_ours_are_taken_where_they_are_asked_for_and_named_for_their_kernels(self):
        chosen = choose_backends(on_cuda=False, **dict.fromkeys(OPS, "davinci"))
        assert all(dict(chosen.places())[op].name == "davinci" for op in OPS)
        assert chosen.own_kernels == [f"backends.{op}: davinci" for op in ("norm", "rope", "swiglu")]
        assert choose_backends(on_cuda=False).own_kernels == []

    @pytest.mark.parametrize("op", OPS)
    def test_they_are_in_our_layers_only(self, op):
        with pytest.raises(EnvironmentProblem, match=rf"backends\.{op}: davinci is in our own layers only"):
            choose_backends(on_cuda=False, layers="transformer_engine", **{op: "davinci"})

    def test_experts_have_no_place_for_swiglu(self):
        with pytest.raises(ConfigError, match=r"model\.experts has experts in their place"):
            validate(
                small.settings(backends={"swiglu": "davinci"}, model={"experts": {"number": 4, "top_k": 2}}),
                "t",
            )


def rounded_to_bf16(whole):
    """Of each setting the share of linear layers whose gradient sum is made of bf16 numbers only."""
    import torch

    from megatron_davinci.model.build import build_model
    from megatron_davinci.train.step import wrap_model
    from tests.stepping import start, tokens_of

    _, platform = start(whole[0])
    shares = []
    for one in whole:
        config = validate(one, "test")
        (model,) = wrap_model(build_model(config, platform), config)
        tokens = tokens_of(config, 0)
        places = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
        model(tokens[:, :-1], places, None, labels=tokens[:, 1:]).sum().backward()
        sums = [p.main_grad for name, p in model.named_parameters() if ".linear_" in name and p.dim() == 2]
        shares.append(sum(torch.equal(one, one.bfloat16().float()) for one in sums) / len(sums))
    return shares


def test_products_add_to_fp32_sums_without_a_gradient_in_bf16():
    whole = [
        settings({"weight_gradient": name}, {}, {}, {"precision": "bf16"}) for name in ("megatron", "davinci")
    ]
    assert run_ranks(1, rounded_to_bf16, whole) == [[1.0, 0.0]]
