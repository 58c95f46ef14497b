"""What is expected of a loss: it comes about where the curve goes on, and ends where a knee was seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.stats.forecast import HORIZON, RATIOS, condensed, forecast, lately

BUDGET = 1e12
OWN = np.arange(1, 41) * 5e9
OTHERS = 3 * OWN
AHEAD = OWN[-1] * np.array([1, 1.25, 1.5])
AHEAD_OTHERS = 3 * AHEAD


def loss(own, knee=np.inf, left=0.05):
    own = np.where(own > knee, np.minimum(knee, 1e300) * (own / np.minimum(knee, 1e300)) ** left, own)
    return 1.6 + 2.1 * (1 + own / 1.5e10) ** -0.35


def noisy(values, seed=0, deviation=0.004):
    return values + np.random.default_rng(seed).normal(0, deviation, len(values))


def gains(values, hazard=0.0, **way):
    return forecast(OWN, OTHERS, values, BUDGET).gains(
        way.get("own", AHEAD), way.get("others", AHEAD_OTHERS), hazard
    )


def test_growth_that_goes_on_is_foreseen():
    true = loss(AHEAD[0]) - loss(AHEAD)
    found = np.mean([gains(noisy(loss(OWN), seed)) for seed in range(5)], axis=0)
    assert found[0] == 0 and found[1:] == pytest.approx(true[1:], rel=0.1)


def test_a_knee_ends_what_is_expected_and_the_same_curve_without_it_does_not():
    knee = OWN[33]
    f = forecast(OWN, OTHERS, noisy(loss(OWN, knee)), BUDGET)
    true = loss(AHEAD[0], knee) - loss(AHEAD, knee)
    assert f.kneed > 0.95 and f.gains(AHEAD, AHEAD_OTHERS)[-1] == pytest.approx(true[-1], abs=0.008)
    f = forecast(OWN, OTHERS, noisy(loss(OWN)), BUDGET)
    assert f.kneed < 0.5 and f.gains(AHEAD, AHEAD_OTHERS, 0.0)[-1] > 0.07


def test_a_knee_is_seen_soon_after_it_and_does_not_come_and_go():
    # A domain that falls back to a small share after its knee: many evaluations at nearly the same tokens.
    own = np.concatenate([np.arange(1, 32) * 1e9, 31e9 + np.arange(1, 41) * 1e8])
    others = np.arange(1, 72) * 4e9 - own
    values = noisy(loss(own, 26e9), 3, 0.003)
    seen = [forecast(own[:n], others[:n], values[:n], BUDGET) for n in (22, 31, 36, 44, 52, 60, 71)]
    assert seen[0].kneed < 0.2 and min(f.kneed for f in seen[1:]) > 0.9
    more = np.array([0, 1.5e10])
    promised = [f.gains(f.seen[0] + more, f.seen[1] + 6e10 - more)[-1] for f in seen]
    assert promised[0] > 0.1 and max(promised[2:]) < 0.04 and max(promised[4:]) < 0.02


def test_a_knee_that_may_lie_ahead_lowers_what_is_expected():
    values = noisy(loss(OWN))
    certain, risky, sure_end = (gains(values, hazard)[-1] for hazard in (0.0, 0.5, 1e3))
    assert RATIOS.mean() * certain - 1e-4 <= sure_end < risky < certain


@pytest.mark.parametrize("transfer", [0.0, 0.014, 0.03])
def test_what_a_domain_at_its_floor_would_gain_is_told_from_what_others_teach_it(transfer):
    # From the ninth evaluation on it is given so little that most of what it learns comes from other domains.
    i = np.arange(1, 71)
    own = np.where(i <= 8, i * 2e9, 16e9 + (i - 8) * 2.6e8)
    others = i * 1e10 - own
    ahead, ahead_others = own[-1] + np.array([0, 2.5e10, 5e10, 7.5e10]), others[-1] + np.arange(4) * 7.5e10

    def true(own, others):
        return 1.5 + 0.85 * (1 + (own + transfer * others) / 12e9) ** -0.23

    gain = true(ahead[0], others[-1]) - true(ahead[-1], ahead_others[-1])
    losses = [noisy(true(own, others), seed, 0.0027) for seed in range(6)]
    found = [forecast(own, others, y, BUDGET).gains(ahead, ahead_others, 0.0)[-1] for y in losses]
    assert np.sqrt(np.mean((np.array(found) / gain - 1) ** 2)) < 0.2


def test_noise_alone_promises_little_and_an_outlier_moves_nothing_far():
    assert 0 <= gains(noisy(np.full(len(OWN), 2.5)))[-1] < 0.004
    values = noisy(loss(OWN))
    plain = gains(values)[-1]
    values[[12, 30]] += 0.1
    assert gains(values)[-1] == pytest.approx(plain, rel=0.15)


def test_nothing_is_expected_of_a_loss_that_rises():
    assert (gains(noisy(2 + OWN / OWN[-1])) == 0).all()


@settings(max_examples=5, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(-6, 3))
def test_units_change_nothing(scale, decades):
    values = noisy(loss(OWN))
    ten = 10.0**decades
    f = forecast(OWN * ten, OTHERS * ten, values * scale, BUDGET * ten)
    assert f.gains(AHEAD * ten, AHEAD_OTHERS * ten) == pytest.approx(gains(values, 0.3) * scale, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 200))
def test_a_condensed_trajectory_keeps_its_sums_and_its_end(count):
    own = np.cumsum(np.random.default_rng(count).uniform(0.5, 1.5, count)) * 1e9
    x, others, y, _, weight = condensed(own, 2 * own, loss(own))
    assert weight.sum() == count and len(x) <= 40 and (np.diff(x) > 0).all()
    assert x @ weight == pytest.approx(own.sum()) and others == pytest.approx(2 * x)
    assert y[-1] == loss(own)[-1] and x[-1] == own[-1]


def shifted(forgets):
    """A domain that falls from a quarter of the tokens to a fortieth, half-way, of a model that forgets or not."""
    i = np.arange(1, 61)
    own = np.where(i <= 30, i * 1e9, 30e9 + (i - 30) * 1e8)
    others = i * 4e9 - own
    latest = lately(own, others, HORIZON * BUDGET)
    return own, others, loss(own ** (1 - forgets) * latest**forgets)


@pytest.mark.parametrize("forgets", [0.0, 0.3])
def test_whether_what_was_not_seen_lately_is_forgotten_is_learnt_where_shares_move(forgets):
    own, others, values = shifted(forgets)
    found = [forecast(own[:n], others[:n], noisy(values, 2, 0.003)[:n], BUDGET) for n in (30, 60)]
    assert found[0].forgets == pytest.approx(0.5, abs=0.1), "shares never moved, so nothing tells"
    assert found[1].forgets > 0.9 if forgets else found[1].forgets < 0.1
    # Half of the tokens ahead against a fortieth: where it forgets, there is more to win back.
    ahead, more = 6e10, np.array([1 / 40, 1 / 2])
    ends = found[1].seen[0] + more * ahead, found[1].seen[1] + (1 - more) * ahead
    latest = found[1].seen[2] / (own[-1] + others[-1])
    share = more + (latest - more) * np.exp(-ahead / (HORIZON * BUDGET))
    known = ends[0] ** (1 - forgets) * (share * sum(ends)) ** forgets
    true = loss(known[0]) - loss(known[1])
    assert found[1].gains(*ends, 0.0)[-1] == pytest.approx(true, rel=0.2)


def test_lately_is_the_sum_where_shares_stay_and_the_present_share_long_after_they_moved():
    assert lately(OWN, OTHERS, 1e10) == pytest.approx(OWN)
    own, others, _ = shifted(0.0)
    assert lately(own, others, 1e9)[-1] == pytest.approx((own + others)[-1] / 40, rel=1e-6)


def test_a_learning_rate_that_falls_is_not_taken_for_growth_nor_for_its_end():
    rates = np.where(np.arange(40) < 25, 3e-3, 3e-3 * (1 - 0.9 * (np.arange(40) - 24) / 16))
    values = noisy(loss(OWN), 1, 0.002)
    plain = forecast(OWN, OTHERS, values, BUDGET).gains(AHEAD, AHEAD_OTHERS)
    lowered = values - 0.25 * (1 - rates / rates[0])
    told, untold = (
        forecast(OWN, OTHERS, lowered, BUDGET, r).gains(AHEAD, AHEAD_OTHERS) for r in (rates, None)
    )
    assert told[1:] == pytest.approx(plain[1:], rel=0.35)
    assert (abs(told - plain) < abs(untold - plain))[1:].all()


def test_a_learning_rate_that_stays_changes_nothing():
    values = noisy(loss(OWN))
    rates = np.full(len(OWN), 2e-4)
    found = [forecast(OWN, OTHERS, values, BUDGET, r).gains(AHEAD, AHEAD_OTHERS) for r in (None, rates)]
    assert (found[0] == found[1]).all()
