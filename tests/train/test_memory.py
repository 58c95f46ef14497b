"""The planner's memory against the tensors that are alive in real steps, and how it answers to the levers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.live_bytes import LiveBytes, measure_all
from megatron_davinci.config import check_layout, validate
from megatron_davinci.train.memory import plan_memory
from tests.config import small
from tests.ranks import run_ranks

MODEL = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 176,
    "vocab_size": 512, "max_sequence_length": 128,
}  # fmt: skip
RECOMPUTE = {
    "none": {},
    "layernorm and mlp": {"granularity": "selective", "modules": ["layernorm", "mlp"]},
    "full": {"granularity": "full"},
    "full, one layer": {"granularity": "full", "method": "block", "layers": 1},
}


def whole(recompute=None, precision="fp32", micro=2, **parallel):
    settings = small.settings(
        model=MODEL,
        parallel={"device": "cpu", **parallel},
        train={"precision": precision, "micro_batch_size": micro, "recompute": recompute or {}},
    )
    settings["data"]["sequence_length"] = 128
    settings["curriculum"][0]["global_batch_size"] = 8
    return settings


def planned(settings, ranks=1):
    config = validate(settings, "test")
    return plan_memory(config, check_layout(config, ranks))


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(2, {"tensor": 2, "sequence": True}, id="TP2+SP", marks=pytest.mark.long),
        pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, id="PP2xVP2", marks=pytest.mark.long),
    ],
)
def test_the_estimate_is_within_15_percent_of_what_is_alive(ranks, parallel):
    settings = [whole(recompute, **parallel) for recompute in RECOMPUTE.values()]
    # Own ops: what they do not keep.
    settings.append(whole(**parallel) | {"backends": dict.fromkeys(("norm", "rope", "swiglu"), "davinci")})
    settings.append(whole(distributed_optimizer=False, **parallel) | {"optimizer": {"kind": "muon"}})
    by_rank = run_ranks(ranks, measure_all, settings)
    for number, name in enumerate([*RECOMPUTE, "own ops", "muon"]):
        plan = planned(settings[number], ranks)
        fullest = max((rank[number] for rank in by_rank), key=lambda measured: measured["total"])
        assert plan.total == pytest.approx(fullest["total"], rel=0.15), name
        for part in ("weights", "gradients", "optimizer"):
            # Buffers are padded to whole buckets.
            assert getattr(plan, part) == pytest.approx(fullest[part], rel=0.01), (name, part)


def test_each_setting_keeps_less_and_recomputes_more():
    plans = [planned(whole(RECOMPUTE[name], micro=8)) for name in ("none", "layernorm and mlp", "full")]
    assert [p.activations for p in plans] == sorted((p.activations for p in plans), reverse=True)
    lean = planned(whole(micro=8) | {"backends": {"swiglu": "davinci"}})
    inner = 4 * MODEL["ffn_hidden_size"] * 8 * 128 * MODEL["num_layers"]
    assert plans[0].activations - lean.activations == 3 * inner
    assert len({(p.weights, p.gradients, p.optimizer) for p in plans}) == 1
    uniform = [planned(whole({"granularity": "full", "layers": n}, micro=8)) for n in (1, 2, 4)]
    assert [p.working for p in uniform] == sorted(p.working for p in uniform)


def test_moments_in_8_bits_are_counted_as_such():
    settings = whole(precision="bf16")
    full = planned(settings)
    eight = planned({**settings, "optimizer": {"moments": "fp8"}})
    assert full.optimizer / 12 == pytest.approx(eight.optimizer / 6.125)
    assert full.total - eight.total == full.optimizer - eight.optimizer


def test_the_parts_add_up():
    plan = planned(whole())
    assert sum(dataclasses.asdict(plan).values()) == plan.total


def test_what_is_alive_is_counted_once_and_no_longer_than_it_is():
    counter = LiveBytes()
    with counter:
        a = torch.ones(100)
        view = a[10:]
        assert counter.now == 400
        b = a + view.sum()
        assert counter.now == 800 + 0
        del a, view
        assert counter.now == 400
        b.untyped_storage().resize_(0)
        assert counter.now == 0
    assert counter.peak >= 800


def alive_after_forward(whole):
    """Bytes that a forward pass leaves behind for the backward pass, and the gradient's norm of the model."""
    import gc

    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from tests.stepping import start

    _, platform = start(whole[0])
    found = []
    for settings in whole:
        config = validate(settings, "test")
        (model,) = build_model(config, platform)
        tokens = torch.randint(512, (2, 129), generator=torch.Generator().manual_seed(0))
        gc.collect()
        counter = LiveBytes()
        with counter:
            losses = model(tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous())
            alive = counter.now
        losses.mean().backward()
        gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        found.append((alive, float(losses.mean()), gradient))
    distributed.stop()
    return [
        (alive, loss, float((gradient - found[0][2]).norm() / found[0][2].norm()))
        for alive, loss, gradient in found
    ]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_activations_in_8_bits_are_as_small_as_planned(precision):
    low = {"recipe": "current", "backend": "emulate"}
    settings = [whole(precision=precision) for _ in range(2)]
    settings[0]["train"]["low_precision"] = low
    settings[1]["train"]["low_precision"] = {**low, "activations": "fp8"}
    (kept, loss, _), (eight, same, apart) = run_ranks(1, alive_after_forward, settings)[0]
    plans = [planned(one) for one in settings]
    planned_less = (plans[0].activations - plans[1].activations) / plans[0].activations
    assert kept - eight == pytest.approx(plans[0].activations - plans[1].activations, rel=0.1)
    assert planned_less > (0.5 if precision == "fp32" else 0.3)
    # The forward pass is the same. So are the operands of weight gradients; what norms and SwiGLU send back is near.
    assert loss == same and 0 < apart < 0.05


@pytest.mark.long  # torch's FP8 products are slow on a CPU
def test_what_norms_and_swiglu_make_is_not_kept_where_it_is_quantised_as_it_is_made():
    settings = []
    own = {"norm": "davinci", "swiglu": "davinci"}
    for backends, codes in (({}, False), (own, False), (own, True), ({}, True)):
        one = whole(precision="bf16")
        one["train"]["low_precision"] = {"recipe": "current", "backend": "native", "keep_codes": codes}
        settings.append(one | {"backends": backends})
    (kept, loss, _), (fused, same, apart), *coded = run_ranks(1, alive_after_forward, settings)[0]
    plans = [planned(one) for one in settings]
    for (more, _, _), plan in zip(coded, plans[2:], strict=True):
        assert kept - more == pytest.approx(plans[0].activations - plan.activations, rel=0.02)
    assert kept - fused == pytest.approx(plans[0].activations - plans[1].activations, rel=0.02)
    assert plans[1].activations < 0.75 * plans[0].activations
    # Megatron-Core's SwiGLU rounds between its two operations.
    assert same == pytest.approx(loss, rel=1e-3) and 0 < apart < 0.05
