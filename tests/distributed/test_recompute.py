"""What is computed again is computed to the same bit."""

from __future__ import annotations

import pytest

from tests.cases import is_long
from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

MODULES = ["core_attn", "layernorm", "mlp"]
SETTINGS = {
    **{name: {"granularity": "selective", "modules": [name]} for name in MODULES},
    "all modules": {"granularity": "selective", "modules": MODULES},
    "full": {"granularity": "full"},
    "full, two at once": {"granularity": "full", "layers": 2},
    "full, the first layer": {"granularity": "full", "method": "block", "layers": 1},
}
OF_EXPERTS = {
    "moe": {"granularity": "selective", "modules": ["moe"]},
    "layernorm and moe": {"granularity": "selective", "modules": ["layernorm", "moe"]},
}
SETTINGS |= OF_EXPERTS
FEW = ("all modules", "full")
long = pytest.mark.long
LAYOUTS = {
    "one rank": (1, {}, {}, {}, [n for n in SETTINGS if n not in OF_EXPERTS] if is_long() else FEW),
    "experts": (1, {}, {"experts": {"number": 4, "top_k": 2}}, {}, [*OF_EXPERTS, "full"]),
    "TP2+SP, dropout, documents": (
        2,
        {"tensor": 2, "sequence": True},
        {"dropout": 0.1},
        {"documents": True},
        FEW,
    ),
    "PP2": (2, {"pipeline": 2}, {}, {}, FEW),
    "TP2, dropout": (2, {"tensor": 2}, {"dropout": 0.1}, {}, FEW),
    "CP2": (2, {"context": 2}, {}, {}, FEW),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}, {}, {}, FEW),
}
SHORT = ("TP2+SP, dropout, documents",)


def whole(recompute, parallel, model):
    return small.settings(
        model={"num_layers": 4, **model},
        parallel={"device": "cpu", **parallel},
        train={"precision": "fp32", "micro_batch_size": 2, "recompute": recompute},
    )


@pytest.mark.parametrize("layout", [pytest.param(n, marks=() if n in SHORT else long) for n in LAYOUTS])
def test_a_run_with_recomputation_is_the_run_without_to_the_bit(layout):
    ranks, parallel, model, options, names = LAYOUTS[layout]
    settings = {"none": {}, **{name: SETTINGS[name] for name in names}}
    settings = {name: whole(recompute, parallel, model) for name, recompute in settings.items()}
    for taken in run_ranks(ranks, _take, settings, options):
        assert len(set(taken["none"].losses)) == 3
        for name in names:
            assert taken[name] == taken["none"], name


def _take(settings, options):
    return take_all(settings, **options)


def test_the_comparison_can_fail():
    settings = {
        "none": whole({}, {}, {}),
        "another": whole({"granularity": "full"}, {}, {"norm_epsilon": 2e-6}),
    }
    (taken,) = run_ranks(1, take_all, settings)
    assert taken["another"] != taken["none"]
