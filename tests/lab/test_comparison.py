"""The statistics of pairs, against scipy's own tests, by hand, and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from megatron_davinci.stats.comparison import holm, paired, pairs_needed, pooled_deviation, power

VALUES = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12)


@given(VALUES)
def test_a_paired_difference_is_scipys(pairs):
    ours, theirs = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    found = paired(ours, theirs)
    if found.deviation < 1e-6:
        return
    expected = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    assert found.p_difference == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    both = [
        stats.ttest_1samp(list(found.each.values()), bound, alternative=side).pvalue
        for bound, side in ((-0.5, "greater"), (0.5, "less"))
    ]
    assert found.p_equivalence(0.5) == pytest.approx(max(both), rel=1e-6, abs=1e-12)


def test_only_seeds_that_both_have_are_pairs():
    found = paired({1: 2.0, 2: 3.0, 4: 9.0}, {1: 1.5, 2: 2.5, 3: 0.0})
    assert found.each == {1: 0.5, 2: 0.5} and found.deviation == 0 and found.p_difference == 0.0
    assert paired({1: 2.0}, {1: 1.0}).p_difference == 1.0
    with pytest.raises(ValueError, match="no pairs"):
        paired({1: 2.0}, {2: 1.0})
    with pytest.raises(ValueError, match="finite"):
        paired({1: float("nan"), 2: 1.0}, {1: 1.0, 2: 1.0})


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("effect", "pairs"), [(0.5, 8), (1.0, 5), (2.0, 3), (0.0, 4)])
def test_power_is_how_often_the_test_finds_it(effect, pairs):
    noise = np.random.default_rng(pairs).normal(size=(20_000, pairs)) + effect
    found = (stats.ttest_1samp(noise, 0.0, axis=1).pvalue < 0.05).mean()
    assert power(effect, 1.0, pairs) == pytest.approx(found, abs=0.012)


@pytest.mark.parametrize(
    ("effect", "pairs", "alpha"), [(8.0, 2, 0.05), (38.0, 2, 0.01), (5.0, 3, 0.01), (2.0, 16, 1e-4)]
)
def test_power_of_few_pairs_and_large_effects(effect, pairs, alpha):
    bound = stats.t.ppf(1 - alpha / 2, pairs - 1)

    def of_scatter(share):
        scatter = np.sqrt(stats.chi2.ppf(share, pairs - 1) / (pairs - 1))
        return stats.norm.sf(bound * scatter - effect * np.sqrt(pairs))

    expected = integrate.quad(of_scatter, 0, 1, limit=400)[0]
    assert power(effect, 1.0, pairs, alpha) == pytest.approx(expected, abs=1e-4)


def test_the_fewest_pairs_that_are_enough():
    for effect in (0.4, 1.0, 3.0):
        need = pairs_needed(effect, 1.0)
        assert power(effect, 1.0, need) >= 0.8 and (need == 2 or power(effect, 1.0, need - 1) < 0.8)
    assert pairs_needed(0.001, 1.0) is None
    assert power(1e3, 1.0, 5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "asked", [(0.0, 1.0), (float("nan"), 1.0), (1.0, float("nan")), (1.0, -1.0), (1.0, 1.0, 0.8, 2.0)]
)
def test_what_no_number_of_pairs_follows_from_is_refused(asked):
    with pytest.raises(ValueError, match=r"^no "):
        pairs_needed(*asked)


@pytest.mark.parametrize("comparisons", [1, 2, 4, 8])
def test_power_holds_where_holm_corrects_for_several_comparisons(comparisons):
    need, generator = pairs_needed(1.0, 1.0, alpha=0.05 / comparisons), np.random.default_rng(comparisons)
    # The control's noise is in all differences, whose deviation is 1; only the first has an effect.
    control = generator.normal(0, 0.5**0.5, (4000, 1, need))
    differences = generator.normal(0, 0.5**0.5, (4000, comparisons, need)) - control
    differences[:, 0] += 1.0
    p = stats.ttest_1samp(differences, 0.0, axis=2).pvalue
    assert np.mean([holm(each)[0] < 0.05 for each in p.tolist()]) >= 0.79


def test_noise_over_comparisons_is_weighted_by_what_each_knows():
    one, two = (
        paired({1: 1.0, 2: 3.0}, {1: 0.0, 2: 0.0}),
        paired({1: 0.0, 2: 0.0, 3: 3.0}, dict.fromkeys((1, 2, 3), 0.0)),
    )
    assert pooled_deviation([one, two]) == pytest.approx(np.sqrt((2.0 + 2 * 3.0) / 3))
    assert pooled_deviation([paired({1: 1.0}, {1: 0.0})]) is None
