"""Suggested layouts go, fit, and are told by what to paste."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_davinci.config import check_layout, load_config
from megatron_davinci.train.memory import plan_memory
from megatron_davinci.train.plan_cost import choose_gpu
from megatron_davinci.train.plan_layouts import ROOM, suggest

CONFIG = Path("examples/davinci_3b/config.yaml")


@pytest.mark.parametrize(("memory", "ranks"), [(80, 256), (40, 64), (24, 128)])
def test_what_is_suggested_goes_and_fits_when_it_is_pasted(memory, ranks):
    config, gpu = load_config(CONFIG), choose_gpu("h100", None, memory)
    found = suggest(config, ranks, gpu, 0.4)
    assert found
    for one in found:
        pasted = load_config(CONFIG, [] if one.overrides.startswith("(") else one.overrides.split())
        assert check_layout(pasted, ranks) == one.layout
        assert plan_memory(pasted, one.layout).total == one.memory <= ROOM * memory * 2**30
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)


def test_less_memory_is_never_faster_and_none_is_none():
    config = load_config(CONFIG)
    best = [suggest(config, 64, choose_gpu("h100", None, memory), 0.4) for memory in (141, 80, 40, 20, 0.2)]
    assert best[-1] == []
    times = [found[0].seconds for found in best[:-1]]
    assert times == sorted(times)


def test_a_gradient_that_is_hidden_costs_nothing_where_the_backward_pass_is_long():
    gpu = choose_gpu("h100", None, None)
    plain = suggest(load_config(CONFIG), 256, gpu, 0.4)[0].seconds
    hidden = suggest(load_config(CONFIG, ["parallel.overlap_gradient_reduce=true"]), 256, gpu, 0.4)[0].seconds
    assert hidden < plain
