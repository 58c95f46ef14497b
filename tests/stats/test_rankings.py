"""Rankings by two ways, and scores in several formats: by hand, against scipy, and on items whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_davinci.stats import rankings
from megatron_davinci.stats.formats import format_spread
from megatron_davinci.stats.rankings import compare_rankings, kendall_tau


def answers(generator, chances, items: int) -> np.ndarray:
    """Right and wrong, with these chances by model; an item is as hard for all of them."""
    hard = generator.random(items)
    return np.array([(hard < chance).astype(float) for chance in chances])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_tau_is_scipy_s_with_ties_too(pairs):
    one, other = zip(*pairs, strict=True)
    ours, theirs = float(kendall_tau(one, other)), stats.kendalltau(one, other).statistic
    assert ours == pytest.approx(theirs, nan_ok=True)


def test_tau_by_hand():
    # Pairs of (1, 2, 3) and (1, 3, 2): two agree and one does not.
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert math.isnan(kendall_tau([1, 2, 3], [0, 0, 0]))


def test_a_pair_that_is_turned_round_is_named_and_no_other():
    generator = np.random.default_rng(0)
    one = answers(generator, [0.3, 0.5, 0.7], 400)
    other = answers(generator, [0.3, 0.7, 0.5], 400)
    found = compare_rankings(["a", "b", "c"], one, other)
    assert [(pair.first, pair.second) for pair in found.pairs if pair.reversed] == [("b", "c")]
    (pair,) = (pair for pair in found.pairs if pair.reversed)
    assert pair.swing == pytest.approx(np.mean((other[2] - other[1]) - (one[2] - one[1])))
    assert pair.low < pair.swing < pair.high < 0
    assert found.tau == pytest.approx(1 / 3)
    assert found.own[0] > 0.9 and found.own[1] > 0.9


def test_noise_alone_reverses_nothing():
    """Five models that are alike: in how many of 25 trials is any pair called reversed, of ten pairs each."""
    generator = np.random.default_rng(1)
    reversed_, flips = 0, 0
    for _ in range(25):
        one, other = ((generator.random((5, 100)) < 0.5).astype(float) for _ in range(2))
        pairs = compare_rankings(list("abcde"), one, other, resamples=20).pairs
        reversed_ += any(pair.reversed for pair in pairs)
        flips += any(pair.flips for pair in pairs)
    assert reversed_ <= 1 and flips >= 20


def test_the_interval_covers_the_tau_of_many_items():
    generator = np.random.default_rng(2)
    chances = [0.3, 0.36, 0.42, 0.48, 0.54]
    covered = 0
    for _ in range(25):
        # The second way has the first two the other way round: the truth is 0.8.
        one = answers(generator, chances, 300)
        other = answers(generator, [chances[1], chances[0], *chances[2:]], 300)
        found = compare_rankings(list("abcde"), one, other, resamples=200)
        covered += found.low <= 0.8 <= found.high
    assert covered >= 22


def test_many_models_are_resampled_some_times_at_once_and_come_to_the_same(monkeypatch):
    generator = np.random.default_rng(4)
    one, other = (answers(generator, np.linspace(0.2, 0.8, 40), 40) for _ in range(2))
    models = [str(number) for number in range(40)]
    whole = compare_rankings(models, one, other, resamples=30)
    held = []

    def counted(a, b):
        held.append(np.atleast_2d(a).shape[0] * 40 * 39 // 2)
        return kendall_tau(a, b)

    monkeypatch.setattr(rankings, "kendall_tau", counted)
    monkeypatch.setattr(rankings, "_AT_ONCE", 2000)
    assert compare_rankings(models, one, other, resamples=30) == whole
    assert max(held) <= 2000


def test_a_way_that_has_all_alike_ranks_nothing():
    one = answers(np.random.default_rng(3), [0.2, 0.8], 50)
    found = compare_rankings(["a", "b"], one, np.zeros((2, 50)))
    assert math.isnan(found.tau) and math.isnan(found.own[1])
    assert not found.pairs[0].flips
    with pytest.raises(ValueError, match="two models"):
        compare_rankings(["a"], one[:1], one[:1])


def test_the_spread_over_formats_by_hand():
    scores = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = format_spread(scores)
    assert found.means == [0.75, 0.25, 0.5]
    assert found.range == 0.5 and found.deviation == pytest.approx(0.25)
    # Cochran's Q from its own definition, with sums of rows 3, 1, 2 and of columns 3, 2, 0, 1.
    q = (3 - 1) * (3 * (9 + 1 + 4) - 36) / (3 * 6 - (9 + 4 + 0 + 1))
    assert found.p == pytest.approx(stats.chi2.sf(q, 2))
    # Sums of squares: formats 4 * 0.125, items, and what is left of all; residual over 6 degrees of freedom.
    rest = ((scores - scores.mean(0)) ** 2).sum() - 4 * 0.125
    assert found.beyond_noise == pytest.approx(math.sqrt(0.0625 - rest / 6 / 4))


def test_formats_that_do_nothing_have_no_spread_beyond_noise():
    generator = np.random.default_rng(4)
    p_values, own = [], []
    for _ in range(60):
        chance = generator.random(200)
        found = format_spread((generator.random((5, 200)) < chance).astype(float))
        p_values.append(found.p)
        own.append(found.beyond_noise)
    assert 0 <= np.mean(np.array(p_values) < 0.05) <= 0.14
    assert np.median(own) < 0.01
    different = format_spread(answers(generator, [0.4, 0.5, 0.6], 200))
    assert different.p < 1e-6 and different.beyond_noise == pytest.approx(0.1, abs=0.03)
    assert format_spread(np.ones((3, 5))).p == 1.0
