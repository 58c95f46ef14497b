"""Early checkpoints against late ones, and the fewest items that rank alike, by hand and with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_davinci.stats.prediction import (
    agreement_with_last,
    decision,
    early_forecast,
    leaves_chance,
)
from megatron_davinci.stats.rankings import kendall_tau
from megatron_davinci.stats.subsets import discrimination, discriminative_subset


def test_a_decision_by_hand():
    # At the end 1 < 2 < 3 = 3: five pairs are apart. Early, one of them is tied and one is wrong.
    found = decision([1.0, 0.5, 1.0, 3.0], [1.0, 2.0, 3.0, 3.0])
    assert (found.pairs, found.right) == (5, (0 + 0.5 + 1 + 1 + 1) / 5)
    assert decision([1, 2, 3], [1, 2, 3]).right == 1.0
    assert math.isnan(decision([1, 2, 3], [1, 1, 1]).right)


def test_a_forecast_of_a_line_over_log_tokens_is_exact_and_the_naive_one_is_not():
    tokens = np.array([1.0, 2, 4, 8, 16])
    found = early_forecast(tokens, 0.1 * np.log2(tokens))
    assert found.checkpoints == 4
    assert found.trend == pytest.approx(0, abs=1e-12) and found.naive == pytest.approx(-0.1)
    assert early_forecast([1, 2, 3], [1, 2, 3]) is None


def test_a_task_leaves_chance_where_it_and_all_later_checkpoints_are_above():
    def right(count: int) -> list[int]:
        return [1] * count + [0] * (100 - count)

    # Wilson's lower end of 34 of 100 is 0.2546, of 33 of 100 it is 0.2456.
    assert leaves_chance([right(40), right(33), right(34)], 0.25) == 2
    assert leaves_chance([right(34), right(40)], 0.25) == 0
    assert leaves_chance([right(40), right(25)], 0.25) is None


def test_items_come_into_their_last_order():
    values = np.array([[3.0, 2, 1], [1, 3, 2], [1, 2, 3]])
    assert agreement_with_last(values).tolist() == pytest.approx([-1, 1 / 3, 1])


def test_discrimination_by_hand():
    scores = np.array([[1.0, 1, 1], [1, 1, 0], [0, 0, 1]])
    # The first item with the sum of the others: (1, 1, 0) with (2, 1, 1).
    assert discrimination(scores)[0] == pytest.approx(np.corrcoef([1, 1, 0], [2, 1, 1])[0, 1])
    assert discrimination(np.ones((3, 4))).tolist() == [0.0] * 4


def answers(generator: np.random.Generator, models: int, good: int, noise: int) -> np.ndarray:
    """Models of rising ability on `good` items that ask for it, and on `noise` that are guessed."""
    ability = np.linspace(-3, 3, models)[:, None]
    chance = 1 / (1 + np.exp(-3 * (ability - generator.normal(0, 1.5, good))))
    return np.concatenate(
        [generator.random((models, good)) < chance, generator.random((models, noise)) < 0.25], 1
    ).astype(float)


def test_items_that_tell_models_apart_are_found_and_verified_on_other_models():
    scores = answers(np.random.default_rng(0), 24, 150, 150)
    found = discriminative_subset(scores, splits=20)
    assert found.found and found.of == 300 and len(found.items) <= 90
    assert np.mean(np.array(found.items) < 150) > 0.9, "half of all items ask for nothing"
    assert found.tau > 0.85 and found.tau > found.random + 0.02


def test_items_that_are_all_guessed_give_no_subset_though_they_fit_the_models_they_were_chosen_on():
    scores = answers(np.random.default_rng(1), 24, 0, 200)
    found = discriminative_subset(scores, splits=20)
    assert not found.found and len(found.items) == 200
    size, verified, random = found.curve[2]
    best = np.argsort(-discrimination(scores))[:size]
    fitted = float(kendall_tau(scores[:, best].sum(1), scores.sum(1)))
    assert fitted > verified + 0.2, "chosen and judged on the same models they look good"
    assert abs(verified - random) < 0.15


def test_too_few_models_and_models_that_are_alike_have_none():
    assert discriminative_subset(np.eye(5)) is None
    assert discriminative_subset(np.ones((8, 40)), splits=4) is None
