"""The three products of a linear layer of few bits, and what surrounds them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.precision import noise, scaling
from tests.cases import is_long
from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import built, start, tokens_of

SIZES = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4}
WIDE = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 64,
}


def settings(recipe="nvfp4", *, model=None, parallel=None, precision="fp32", micro=2, length=32, **low):
    size = {**SIZES, **(model or {}), "max_sequence_length": length}
    return small.settings(
        logging={"sharpness_every_steps": 1},
        model=size,
        parallel={"device": "cpu", **(parallel or {})},
        data={"sequence_length": length},
        train={
            "precision": precision,
            "micro_batch_size": micro,
            "threads": 1,
            "low_precision": {"recipe": recipe, "backend": "emulate", **low} if recipe else {},
        },
    )


def one_linear(whole):
    """Products of a built model with random operands: how far each is from the same by hand, and from the exact."""
    config, platform = start(whole)
    chunks, _, _ = built(config, platform)
    low = chunks[0].low_precision
    low.shared.samples = torch.tensor([5, 9])
    found = {}
    for product in low.products[:4]:
        out, wide = product.linear.weight.shape
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(config.data.sequence_length, 2, wide, generator=generator) * 3
        g = torch.randn(config.data.sequence_length, 2, out, generator=generator) / 1000
        x.requires_grad_()
        weight = torch.nn.Parameter(product.linear.weight.detach().clone())
        y = product(x, weight, None)
        y.backward(g)
        w = weight.detach()
        hand = by_hand(low.shared, product, x.detach(), w, g)
        exact = [x.detach() @ w.t(), g @ w, g.flatten(0, 1).t() @ x.detach().flatten(0, 1)]
        found[product.place] = [
            tuple(float((ours - one).norm() / one.norm()) for one in (by, true))
            for ours, by, true in zip([y.detach(), x.grad, weight.grad], hand, exact, strict=True)
        ]
    return found


def all_linears(whole):
    found = {}
    for name, one in whole.items():
        found[name] = one_linear(one)
        from megatron_davinci.platform import distributed

        distributed.stop()
    return found


def by_hand(shared, product, x, w, g):
    """`y`, `dx` and `dw` from the definition of the recipe."""
    recipe, x2, g2 = shared.recipe, x.flatten(0, 1), g.flatten(0, 1)
    tokens = (torch.arange(x.shape[0])[:, None] + shared.samples * shared.length).flatten()

    def kept(matrix, how, what="", turned=False):
        drawn = None
        if how.rounding == "stochastic":
            keys = noise.key(shared.seed, product.layer, f"{product.place} {what}")
            drawn = noise.uniform(keys, tokens, torch.arange(g2.shape[1]))
            drawn = drawn.t() if turned else drawn
        return scaling.quantize(matrix.contiguous(), how, noise=drawn).dequantized()

    y = kept(x2, recipe.input) @ kept(w, recipe.weight).t()
    dx = kept(g2, recipe.gradient, "gradient") @ kept(w.t(), recipe.weight_back).t()
    by_token = kept(g2.t(), recipe.gradient_back, "gradient for weights", turned=True)
    dw = by_token @ kept(x2.t(), recipe.input_back).t()
    return [y.view(*g.shape), dx.view(*x.shape), dw]


RECIPES: dict[str, dict[str, Any]] = {
    "delayed": {},
    "current": {},
    "mxfp8": {},
    "nvfp4": {},
    "block": {"model": WIDE, "length": 64},
    "bits": {"bits": {"format": "E8M3"}},
}
WORST = {"nvfp4": 0.3, "bits": 0.15}


def test_each_product_is_that_of_the_recipe():
    found = run_ranks(1, all_linears, {name: settings(name, **more) for name, more in RECIPES.items()})[0]
    for recipe, places in found.items():
        assert len(places) == 4
        for place, errors in places.items():
            for by_hand_error, error in errors:
                assert by_hand_error < 1e-6, (recipe, place)
                assert 1e-3 < error < WORST.get(recipe, 0.08), (recipe, place, error)


BATCH = 4  # sequences a step
COUNT = 2 if is_long() else 1  # steps


def steps(whole: dict[str, dict], count=COUNT):
    """Losses and gradients' norms of a few steps of each, and what was watched in the last."""
    _, platform = start(next(iter(whole.values())))
    found = {}
    for name, one in whole.items():
        config = validate(one, "test")
        _, _, stepper = built(config, platform)
        taken, sharpness = [], []
        for step in range(count):
            tokens = tokens_of(config, step, BATCH)
            import numpy as np
            from megatron.core import parallel_state

            rank, ranks = (
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
            )
            micro = config.train.micro_batch_size
            numbers = (np.arange(BATCH) + BATCH * step).reshape(-1, ranks, micro)[:, rank].reshape(-1)
            result = stepper.train(tokens, len(tokens) // micro, numbers=numbers, watch=True, sharpness=True)
            taken.append((result.loss, result.grad_norm))
            sharpness.append(result.sharpness)
            if step == 0 and (low := stepper.low_precision) is not None:
                first = low.report()
        low = stepper.low_precision
        watched = {} if low is None else {"watched": low.report(), "first": first}
        found[name] = {"taken": taken, "sharpness": sharpness, **watched}
    from megatron_davinci.platform import distributed

    distributed.stop()
    return found


EVERY = {name: settings(name, **more) for name, more in RECIPES.items()}


def named(name, **more):
    """A recipe, or `current` with activations kept in 8 bits."""
    if name == "native_block":
        return settings("block", backend="native", **RECIPES["block"], **more)
    return settings("current", activations="fp8", **more) if name == "eight" else settings(name, **more)


def changed(section, **more):
    """NVFP4, and something else."""
    one = settings("nvfp4")
    one[section] = {**one.get(section, {}), **more}
    return one


MADE = [("made", "current", {})]
if is_long():
    MADE += [
        ("made, with scales of blocks", "block", {}),
        ("made, of known scale", "delayed", {}),
        ("made, with a tail", "current", {"tail_tokens": "1M", "tail": "forward"}),
    ]
MORE = {
    "eight": named("eight"),
    "native": settings("current", backend="native"),
    "native_block": named("native_block"),
    "native_delayed": settings("delayed", backend="native"),
    "none": settings(None),
    "wide": settings(None, model=WIDE, length=64),
    "bf16": settings("nvfp4", precision="bf16"),
    "full": changed("train", recompute={"granularity": "full", "method": "uniform", "layers": 1}),
    "some": changed("train", recompute={"granularity": "selective", "modules": ["layernorm", "mlp"]}),
    "fused": changed("backends", swiglu="davinci"),
    **{
        f"{name} {how}": {
            **settings(recipe, backend="native", **RECIPES[recipe], **more),
            # Rotary positions overwrite what a product has made.
            "backends": {"norm": norm, "swiglu": "davinci", "rope": "davinci"},
        }
        for name, recipe, more in MADE
        for how, norm in (("on the way", "davinci"), ("before", "local"))
    },
    **{
        f"{name} kept": {
            **settings(recipe, backend="native", keep_codes=True, **RECIPES[recipe], **more),
            "backends": {"norm": "davinci", "swiglu": "davinci", "rope": "davinci"},
        }
        for name, recipe, more in MADE
    },
}


@functools.cache
def alone():
    """All of them on one rank."""
    return run_ranks(1, steps, {**EVERY, **MORE}, timeout=900)[0]


def test_losses_are_near_those_of_fp32_and_are_not_them():
    found = alone()
    for name in RECIPES:
        plain = found["wide" if name == "block" else "none"]["taken"]
        for (loss, norm), (true_loss, true_norm) in zip(found[name]["taken"], plain, strict=True):
            assert 0 < abs(loss / true_loss - 1) < 0.01, name
            assert 0 < abs(norm / true_norm - 1) < 0.2, name


def test_what_is_watched_is_of_every_linear_layer_and_operand():
    for name in RECIPES:
        watched = alone()[name]["watched"]
        assert set(watched) == {
            f"layers.{n}.{place}"
            for n in range(2)
            for place in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
        }
        for operands in watched.values():
            assert set(operands) == {"input", "weight", "gradient"}
            for one in operands.values():
                assert one["amax"] > 0 and one["scale"] > 0 and 0 <= one["overflow"] < 0.2
                assert 0 <= one["underflow"] < (0.5 if name == "nvfp4" else 0.1)
    assert "watched" not in alone()["none"]
    small_numbers = [o["underflow"] for o in (w["gradient"] for w in alone()["nvfp4"]["watched"].values())]
    assert max(small_numbers) > 0.01


LAYOUTS = {
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "pipeline 2": {"pipeline": 2},
    "tensor 2": {"tensor": 2},
    "context 2": {"context": 2},
    "data 2": {},
}


def over_layouts(layouts, names):
    """`steps` for each layout, on the same ranks."""
    from megatron.core import parallel_state

    from megatron_davinci.platform import distributed

    stop, found = distributed.stop, {}
    distributed.stop = parallel_state.destroy_model_parallel
    for layout in layouts:
        found[layout] = steps({name: named(name, parallel=LAYOUTS[layout]) for name in names})
    distributed.stop = stop
    stop()
    return found


@pytest.mark.parametrize(
    ("layouts", "names"),
    [
        (("tensor 2, sequence", "pipeline 2"), ("delayed", "nvfp4", "eight", "native_block")),
        pytest.param(
            tuple(LAYOUTS), ("current", "delayed", "mxfp8", "nvfp4", "bits", "eight"), marks=pytest.mark.long
        ),
    ],
)
def test_layouts_take_the_same_step_but_for_the_order_of_sums(layouts, names):
    """Scales and noise are those of whole tensors, so operands of the first step are the same but for last digits of
    sums. From the second on, those decide between two numbers of a format here and there."""
    there = run_ranks(2, over_layouts, layouts, names)
    for layout in layouts:
        for name in names:
            ours, one = there[0][layout][name], alone()[name]
            (loss, norm), *later = ours["taken"]
            (alone_loss, alone_norm), *alone_later = one["taken"]
            assert loss == pytest.approx(alone_loss, rel=1e-7), (layout, name)
            # What is kept in 8 bits of activations is rounded to few numbers: a last digit decides there too, and
            # here and there with fewer bits. Torch's own products add in an order that depends on the matrix's shape.
            loose = name in ("eight", "native_block")
            assert norm == pytest.approx(alone_norm, rel=1e-3 if loose else 1e-4), (layout, name)
            assert (
                ours["sharpness"][0] == pytest.approx(one["sharpness"][0], rel=1e-4)
                and one["sharpness"][0] > 0
            )
            for (second, second_norm), (other, other_norm) in zip(later, alone_later, strict=True):
                assert second == pytest.approx(other, rel=1e-4), (layout, name)
                assert second_norm == pytest.approx(other_norm, rel=0.1), (layout, name)
            for where, operands in one["first"].items():
                for operand, alone_one in operands.items():
                    found = ours["first"][where][operand]
                    for figure, tolerance in (
                        ("amax", 0),
                        ("scale", 0),
                        ("underflow", 0.01 if loose else 5e-3),
                        ("overflow", 0.01 if loose else 5e-3),
                    ):
                        near = 0.05 if loose else 2e-3 if name == "bits" else 1e-5
                        assert found[figure] == pytest.approx(alone_one[figure], rel=near, abs=tolerance)


def test_a_bf16_run_is_near_an_fp32_run():
    for (loss, _), (fp32, _) in zip(alone()["bf16"]["taken"], alone()["nvfp4"]["taken"], strict=True):
        assert loss == pytest.approx(fp32, rel=0.01)


@pytest.mark.parametrize(
    ("own", "recipe"), [("native", "current"), ("native_block", "block"), ("native_delayed", "delayed")]
)
def test_torch_s_own_products_take_the_emulated_steps(own, recipe):
    (loss, norm), *_ = alone()[own]["taken"]
    (emulated, emulated_norm), *_ = alone()[recipe]["taken"]
    assert loss == pytest.approx(emulated, rel=1e-7) and norm == pytest.approx(emulated_norm, rel=1e-6)
    for where, operands in alone()[recipe]["first"].items():
        for operand, one in operands.items():
            for figure, found in alone()[own]["first"][where][operand].items():
                # A gradient that is 0 in one may be next to it in the other: the first token's attention has such.
                near = {"abs": 0.03} if figure == "underflow" else {"rel": 1e-5, "abs": 1e-3}
                assert found == pytest.approx(one[figure], **near), (where, operand, figure, found)


def test_activations_in_8_bits_change_gradients_a_little_and_losses_not_at_once():
    ours, theirs = alone()["eight"]["taken"], alone()["current"]["taken"]
    assert ours[0][0] == theirs[0][0] and ours[0][1] != theirs[0][1]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=0.02)


def test_recomputation_and_own_swiglu_change_nothing():
    found = alone()
    assert found["full"] == found["some"] == found["nvfp4"]
    for ours, theirs in zip(found["fused"]["taken"], found["nvfp4"]["taken"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_what_is_made_on_the_way_into_8_bits_is_what_was_made_before():
    found = alone()
    for name, *_ in MADE:
        ours, theirs = (found[f"{name} {how}"] for how in ("on the way", "before"))
        assert ours["taken"] == theirs["taken"] and ours["watched"] == theirs["watched"], name
        kept = found[f"{name} kept"]  # both ways at once, once a step for weights
        assert kept["taken"] == ours["taken"], name


def unwritten_and_written(whole, count=2):
    """Steps in which gradients through SwiGLU are not written, the same with them written, and how many were not."""
    from megatron_davinci.model import precision_state, unwritten

    fuse, give, given, turns = precision_state.fuse, unwritten.give, [], iter((True, False))

    def fusing(chunks, products):
        fuse(chunks, products)
        if not next(turns):
            for product in products:
                product.source = None

    def giving(node, matrix, shape):
        given.append(node.product.name)
        return give(node, matrix, shape)

    precision_state.fuse, unwritten.give = fusing, giving
    try:
        return steps({"unwritten": whole, "written": whole}, count), len(given)
    finally:
        precision_state.fuse, unwritten.give = fuse, give


RECOMPUTED = {
    "full": {"granularity": "full", "method": "uniform", "layers": 1},
    "mlp": {"granularity": "selective", "modules": ["mlp"]},
}


@pytest.mark.parametrize(
    ("layout", "layers", "recipe", "recompute", "low"),
    [
        ("tensor 2, sequence", 1, "delayed", "full", {"keep_codes": True}),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("tensor 2", 2, "delayed", None, {"keep_codes": True}),
                ("tensor 2", 2, "current", "mlp", {}),
                ("pipeline 2", 2, "delayed", None, {}),
                ("context 2", 2, "current", None, {"keep_codes": True}),
                ("data 2", 2, "delayed", "mlp", {"tail_tokens": "1M", "tail": "forward"}),
            )
        ),
    ],
)
def test_a_gradient_through_swiglu_that_is_not_written_changes_no_bit(layout, layers, recipe, recompute, low):
    parallel = LAYOUTS[layout]
    whole = settings(recipe, backend="native", parallel=parallel, model={"num_layers": layers}, **low)
    whole["backends"] = {"norm": "davinci", "swiglu": "davinci", "rope": "davinci"}
    if recompute:
        whole["train"]["recompute"] = RECOMPUTED[recompute]
    for found, given in run_ranks(2, unwritten_and_written, whole):
        # Of a rank's layers, in two steps of its micro-batches.
        assert given == 2 * layers * (1 if layout in ("data 2", "pipeline 2") else 2)
        assert found["unwritten"] == found["written"]


def kept_layers(whole):
    """Whose products are of few bits, and held-out losses before and in the tail."""
    config, platform = start(whole)
    chunks, _, stepper = built(config, platform)
    low = chunks[0].low_precision
    tokens, found = tokens_of(config, 0), []
    for step, left in ((49, 129), (50, 128), (51, 1)):
        watched = low.begin_step(step, left)
        found.append((stepper.loss(tokens, 4, 2)[0], low.shared.forward, low.shared.backward, watched))
    result = stepper.train(tokens, 4, watch=True)
    return [product.name for product in low.products], found, result.low_precision


@pytest.mark.parametrize("tail", ["forward", "all"])
def test_kept_layers_and_the_tail_multiply_as_they_are(tail):
    whole = settings("nvfp4", keep_first_layers=1, tail_tokens=128, tail=tail, watch_every_steps=25)
    names, (before, at, end), lost = run_ranks(1, kept_layers, whole)[0]
    assert {name.split(".")[1] for name in names} == {"1"} and len(names) == 4
    assert before[1:] == (True, True, False) and at[1:] == (False, tail == "forward", True)
    assert before[0] != at[0] == end[0] and end[3] is False
    assert ("gradient" in lost.get("layers.1.linear_fc1", {})) == (tail == "forward")


def with_an_infinite_gradient(whole):
    """A step whose gradient is infinite in one place, where a scale of earlier steps would clip it."""
    from megatron_davinci.train.step import NotApplied

    config, platform = start(whole)
    chunks, _, stepper = built(config, platform)
    stepper.train(tokens_of(config, 0), 4)
    before = [product.known for product in chunks[0].low_precision.products]
    product = next(one for one in chunks[0].low_precision.products if one.name == "layers.1.linear_fc1")
    gradient = product.gradient
    product.gradient = lambda g: gradient(
        g.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.inf))
    )
    try:
        stepper.train(tokens_of(config, 1), 4)
    except NotApplied as refused:
        after = [product.known for product in chunks[0].low_precision.products]
        return str(refused), refused.is_spike, before == after
    return None


def test_what_is_infinite_is_not_clipped_in_silence():
    said, is_spike, same_scales = run_ranks(1, with_an_infinite_gradient, settings("delayed"))[0]
    assert "not finite is layers.1.linear_fc1's gradient" in said and not is_spike and same_scales


def refusal(recipe="nvfp4", **more):
    with pytest.raises(ConfigError) as caught:
        validate(settings(recipe, **more), "test")
    return str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "more", "said"),
    [
        (
            "nvfp4",
            {"backend": "native"},
            "native multiplies by recipe: delayed, current and block; found nvfp4",
        ),
        ("current", {"backend": "native", "model": {"ffn_hidden_size": 72}}, "(72) is not a multiple of 16"),
        ("mxfp8", {"model": {"ffn_hidden_size": 80}}, "(80) is not a multiple of 32"),
        ("block", {}, "model.hidden_size (64) is not a multiple of 128"),
        (
            "nvfp4",
            {"micro": 1, "length": 24},
            "tokens of a micro-batch on a rank (24) is not a multiple of 16",
        ),
        ("nvfp4", {"keep_first_layers": 1, "keep_last_layers": 1}, "none is left"),
        ("bits", {"bits": {"format": "E9M1"}}, "E9M1 is no format"),
        ("current", {"bits": {"format": "E8M2"}}, "bits acts with recipe: bits"),
        ("current", {"nvfp4": {"hadamard": False}}, "nvfp4 acts with recipe: nvfp4"),
        ("current", {"amax_history": 4}, "amax_history acts with recipe: delayed"),
        (
            "mxfp8",
            {"activations": "fp8"},
            "keeps what recipe: delayed or current multiplies; found recipe: mxfp8",
        ),
        ("current", {"tail": "forward"}, "for tail_tokens; there are none"),
        ("none", {}, "backend acts with a recipe"),
        ("current", {"parameters": True}, "parameters is Transformer Engine's"),
        ("nvfp4", {"parameters": True, "backend": "auto"}, "needs a recipe of FP8"),
        ("current", {"backend": "transformer_engine"}, "is beside bf16; found train.precision: fp32"),
    ],
)
def test_what_does_not_go_is_said(recipe, more, said):
    assert said in refusal(recipe, **more)


def test_a_block_that_does_not_divide_is_said_where_auto_emulates():
    whole = settings("block", backend="auto")
    validate(whole, "test")  # Transformer Engine takes 16
    with pytest.raises(EnvironmentProblem, match=r"model.hidden_size \(64\) is not a multiple of 128"):
        run_ranks(1, one_linear, whole)
