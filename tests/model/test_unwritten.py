"""The gradient through SwiGLU between two linear layers in FP8: not written, and all that follows is the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from megatron_davinci.kernels import quantize, swiglu, ways
from megatron_davinci.model import low_precision, unwritten
from megatron_davinci.model.low_precision import Shared
from megatron_davinci.model.makers import Norm, SwiGLU
from megatron_davinci.model.native_product import NativeProduct
from megatron_davinci.precision import recipes

TOKENS, BATCH, HIDDEN, WIDTH = 8, 2, 16, 32


class MLP:
    """Two linear layers as `fuse` leaves them, with their weights' sums; `written` as it would be without."""

    def __init__(self, *, delayed=True, written=False, norm=False, keep_codes=False, device="cpu"):
        g = torch.Generator().manual_seed(3)
        recipe = recipes.tensor_scaled(delayed=delayed)
        self.shared = Shared(recipe, seed=1, length=TOKENS, keep_codes=keep_codes, learning=True)
        of_norm = (torch.rand(HIDDEN, generator=g).bfloat16() + 0.5).to(device)
        self.norm, self.device = SimpleNamespace(weight=of_norm.requires_grad_(), eps=1e-6), device
        shapes = {"linear_fc1": (2 * WIDTH, HIDDEN), "linear_fc2": (HIDDEN, WIDTH)}
        self.weights, made = [], []
        for place, shape in shapes.items():
            weight = torch.nn.Parameter((torch.randn(shape, generator=g) / 6).bfloat16().to(device))
            weight.main_grad = torch.zeros(shape, device=device)
            linear = SimpleNamespace(weight=weight, tp_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
            made.append(
                NativeProduct(self.shared, 0, place, linear, None, None, sharded_input=place == "linear_fc2")
            )
            made[-1].amax = torch.zeros(3, device=device)
            self.weights.append(weight)
        self.first, self.second = made
        self.second.maker = SwiGLU()
        self.second.source = None if written else self.first
        if norm:
            self.first.maker = Norm(self.norm)

    def __call__(self, x, behind=None):
        gates = self.first(x, self.weights[0], None)
        if behind is not None:
            behind(gates)
        return self.second(gates, self.weights[1], None)

    def steps(self, *, count=2, micro_batches=2, again=None):
        """All that some steps leave behind."""
        g, found = torch.Generator().manual_seed(4), []
        for _ in range(count):
            for _ in range(micro_batches):
                x, by_out = (
                    torch.randn(TOKENS, BATCH, HIDDEN, generator=g).bfloat16().to(self.device)
                    for _ in range(2)
                )
                x.requires_grad_()
                out = self(x) if again is None else checkpoint(self, x, use_reentrant=again)
                out.backward(by_out / 100)
                found.append(x.grad)
            found += [weight.main_grad.clone() for weight in self.weights]
            for one in (self.first, self.second):
                found.append(one.amax.clone())
                if self.shared.recipe.delayed:
                    one.remember(one.amax.clone(), [True] * 3)
                one.weight_codes = None
        return found if self.norm.weight.grad is None else [*found, self.norm.weight.grad]


@pytest.fixture
def seen(monkeypatch):
    """How often a gradient through SwiGLU was written, and how often one went into codes that was not."""
    counts = {"written": 0, "unwritten": 0}
    backward, quantized = swiglu.backward, quantize.quantized

    def counting(*arguments):
        counts["unwritten"] += arguments[5] == "swiglu_gradient"
        return quantized(*arguments)

    def writing(*arguments):
        counts["written"] += 1
        return backward(*arguments)

    monkeypatch.setattr(quantize, "quantized", counting)
    monkeypatch.setattr(swiglu, "backward", writing)
    return counts


CASES = [
    {},
    {"delayed": False},
    {"norm": True},
    {"keep_codes": True},
    {"norm": True, "keep_codes": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case) or "delayed")
@pytest.mark.parametrize(
    "way",
    [
        "reference",
        pytest.param("emulator", marks=pytest.mark.needs("emulator")),
        pytest.param("auto", marks=pytest.mark.gpu, id="cuda"),
    ],
)
def test_steps_are_the_same_to_the_bit(way, case, seen):
    device = "cuda" if way == "auto" else "cpu"
    with ways.using(way):
        ours = MLP(**case, device=device).steps()
        assert seen["unwritten"] == 4 and (way == "reference" or not seen["written"])
        theirs = MLP(**case, device=device, written=True).steps()
        assert seen["unwritten"] == 4 and seen["written"] >= 4
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and one.float().abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_of_what_is_computed_again_too(reentrant, seen):
    ours, theirs = MLP().steps(again=reentrant), MLP(written=True).steps()
    assert seen["unwritten"] == 4
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_or_infinite_is_noted_as_if_it_had_been_written(value):
    found = []
    for written in (False, True):
        mlp = MLP(written=written)
        mlp.steps(count=1, micro_batches=1)
        product, place = mlp.second.input_gradient, (torch.tensor(3), torch.tensor(5))
        mlp.second.input_gradient = lambda *of, product=product, place=place: product(*of).index_put(
            place, torch.tensor(value, dtype=torch.bfloat16)
        )
        x = torch.ones(TOKENS, BATCH, HIDDEN).bfloat16().requires_grad_()
        mlp(x).float().sum().backward()
        found.append((mlp.first.amax, mlp.weights[0].main_grad, x.grad))
    (amax, *ours), (right, *theirs) = found
    assert amax.tolist()[:2] == right.tolist()[:2] and not amax[2].isfinite()
    for one, other in zip([amax, *ours], [right, *theirs], strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


@pytest.mark.parametrize("kind", [low_precision.LowPrecisionProduct, NativeProduct])
def test_where_gradients_alone_are_of_few_bits_all_their_operands_are_noted(kind):
    # In the tail of a run: scales of a history would else be of the steps before it.
    mlp = MLP()
    product = kind(mlp.shared, 0, "linear_fc1", mlp.first.linear, None, None, sharded_input=False)
    mlp.shared.forward = False
    x = torch.randn(TOKENS, BATCH, HIDDEN).bfloat16().requires_grad_()
    product(x, mlp.weights[0], None).sum().backward()
    expected = [x.detach().abs().amax(), mlp.weights[0].detach().abs().amax(), torch.tensor(1.0)]
    assert product.amax.tolist() == [float(one) for one in expected]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_none_of_one_tensor_rank_s_part_is_so_on_all_ranks(bad, monkeypatch):
    def reduced(total, op, group):
        # With another rank's largest number, by a collective that drops what is no number.
        total.copy_(torch.fmax(total, torch.tensor(3.0)))

    monkeypatch.setattr(low_precision.dist, "all_reduce", reduced)
    assert not low_precision.largest_of("a group", torch.tensor(bad)).isfinite()
    assert low_precision.largest_of("a group", torch.tensor(2.0)) == 3


def test_it_is_written_where_it_is_not_certain_who_takes_it(seen, caplog):
    unwritten._declined.cache_clear()
    x = torch.randn(TOKENS, BATCH, HIDDEN, generator=torch.Generator().manual_seed(5)).bfloat16()

    def gradient(mlp, forward, anomaly=False):
        leaf, before = x.clone().requires_grad_(), dict(seen)
        with torch.autograd.set_detect_anomaly(anomaly):
            forward(mlp, leaf).float().sum().backward()
        assert seen["unwritten"] == before["unwritten"] and seen["written"] > before["written"]
        assert leaf.grad.isfinite().all() and leaf.grad.any()

    def with_something_between(mlp, leaf):
        return mlp.second(mlp.first(leaf, mlp.weights[0], None) * 1, mlp.weights[1], None)

    def of_another_layer(mlp, leaf):
        other = MLP()
        return mlp.second(other.first(leaf, other.weights[0], None), mlp.weights[1], None)

    def with_a_bias(mlp, leaf):
        bias = torch.zeros(2 * WIDTH, dtype=torch.bfloat16)
        return mlp.second(mlp.first(leaf, mlp.weights[0], bias), mlp.weights[1], None)

    for forward in (with_something_between, of_another_layer, with_a_bias):
        gradient(MLP(), forward)
    assert caplog.text.count("something is between the two linear layers") == 1
    mlp = MLP()
    for weight in mlp.weights:
        del weight.main_grad  # beside one, what is returned for the weight is whatever was in memory
    gradient(mlp, lambda mlp, leaf: mlp(leaf), anomaly=True)
    mlp = MLP()
    mlp.shared.backward = False  # the tail
    gradient(mlp, lambda mlp, leaf: mlp(leaf))
    mlp = MLP()
    node = mlp.first(x.clone().requires_grad_(), mlp.weights[0], None).grad_fn
    assert unwritten.takes(node) and not unwritten.takes(None)
    how = replace(mlp.shared.recipe.gradient, blocks="row")
    mlp.shared.recipe = replace(mlp.shared.recipe, gradient=how)
    assert not unwritten.takes(node)


def test_who_else_looks_at_it_sees_no_number_and_a_second_use_is_refused():
    mlp, looked = MLP(), []
    x = torch.ones(TOKENS, BATCH, HIDDEN).bfloat16().requires_grad_()
    mlp(x, lambda gates: gates.register_hook(lambda by: looked.append(by))).float().sum().backward()
    assert looked[0].isnan().all() and looked[0].untyped_storage().nbytes() == 2 and x.grad.isfinite().all()

    kept = []
    out = mlp(x, kept.append)
    with pytest.raises(RuntimeError, match=r"layers.0.linear_fc1: its outputs are used by more than SwiGLU"):
        (out.float().sum() + kept[0].float().sum()).backward()
    out = mlp(x, lambda gates: gates.register_hook(lambda by: by * 2))
    with pytest.raises(RuntimeError, match="a hook has changed their gradient"):
        out.float().sum().backward()
    # What was refused leaves nothing behind.
    x.grad = None
    mlp(x).float().sum().backward()
    assert x.grad.isfinite().all()


def test_what_it_is_made_of_is_gone_when_there_are_codes_of_it(monkeypatch):
    mlp, give, made, gone = MLP(), unwritten.give, [], []

    def giving(node, matrix, shape):
        made.extend(StorageWeakRef(one.untyped_storage()) for one in matrix)
        return give(node, matrix, shape)

    monkeypatch.setattr(unwritten, "give", giving)
    product = mlp.first.input_gradient
    mlp.first.input_gradient = lambda *of: (gone.extend(one.expired() for one in made), product(*of))[1]
    mlp(torch.ones(TOKENS, BATCH, HIDDEN).bfloat16().requires_grad_()).float().sum().backward()
    assert gone == [True, True]


def test_backward_may_be_called_twice():
    mlp = MLP()
    mlp.steps(count=1)
    x = torch.ones(TOKENS, BATCH, HIDDEN).bfloat16().requires_grad_()
    total = mlp(x).float().sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
