"""The simulated worlds that controllers are measured in: their optimum is one, and bounds hold in them."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import controller_world as worlds


@pytest.mark.parametrize("fading", [0.0, 0.4])
def test_no_mixture_within_bounds_is_better_than_the_optimum(fading):
    rng = np.random.default_rng(3)
    world = replace(worlds.draw(rng), fading=fading)
    count = len(world.names)
    best = world.goal(worlds.optimum(world, np.full((1, count), 1 / count)))
    tried = np.clip(rng.dirichlet(np.ones(count), 300), float(worlds.FLOOR), float(worlds.CEILING))
    tried = tried[np.abs(tried.sum(axis=1) - 1) < 1e-9]
    assert len(tried) > 100 and (world.goal(tried[:, None]) >= best - 1e-6).all()


def test_order_counts_only_where_what_was_learnt_fades():
    world = worlds.draw(np.random.default_rng(4))
    schedule = np.random.default_rng(5).dirichlet(np.ones(len(world.names)), 10)
    assert world.goal(schedule) == pytest.approx(world.goal(schedule[::-1]))
    fades = replace(world, fading=0.4)
    assert fades.goal(schedule) > world.goal(schedule)
    assert fades.goal(schedule) != pytest.approx(fades.goal(schedule[::-1]), abs=1e-5)


def test_a_controller_gains_over_even_shares_and_never_leaves_its_bounds():
    world = worlds.draw(np.random.default_rng(6))
    even = np.full((1, len(world.names)), 1 / len(world.names))
    end, violations = worlds.run(
        world, worlds.policy_named("saturation", world), 10, np.random.default_rng(7)
    )
    assert violations == 0 and end < float(world.goal(even))
