"""The simulated worlds that controllers are measured in: their optimum is one, and bounds hold in them."""

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import controller_world as worlds

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies import make_policy, returns
from megatron_davinci.train.policies.bounded import decide
from megatron_davinci.train.policies.situation import Bounds, Evaluation, Situation


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


def test_what_the_monitor_says_moves_no_share_where_no_domain_is_of_another_format(monkeypatch):
    # The benchmark leaves it out for its time.
    rng = np.random.default_rng(8)
    evaluations = tuple(
        Evaluation(i, i * 10**6, {"a": i * 6 * 10**5, "b": i * 4 * 10**5}, {"a": 2 + a, "b": 2 + b})
        for i, (a, b) in enumerate(1 / np.arange(2, 14)[:, None] ** 0.3 + rng.normal(0, 1e-3, (12, 2)), 1)
    )
    mixture = {"a": Fraction(6, 10), "b": Fraction(4, 10)}
    situation = Situation(evaluations, mixture, Bounds({}, {}, Fraction(1, 10)), 10**8)
    policy = make_policy(ControllerConfig.model_validate({"mode": "apply", "policy": "saturation"}))
    with_words = decide(policy, situation)
    monkeypatch.setattr(returns, "_monitor", worlds.without_words)
    assert with_words.changes and decide(policy, situation).mixture == with_words.mixture


def test_a_controller_gains_over_even_shares_and_never_leaves_its_bounds(monkeypatch):
    monkeypatch.setattr(returns, "_monitor", worlds.without_words)
    world = worlds.draw(np.random.default_rng(6))
    even = np.full((1, len(world.names)), 1 / len(world.names))
    end, violations = worlds.run(
        world, worlds.policy_named("saturation", world), 10, np.random.default_rng(7)
    )
    assert violations == 0 and end < float(world.goal(even))
