"""The monitor: a knee where there is one, none in a power law or at a step, and what the trajectory does now."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.errors import DataError
from megatron_davinci.stats.saturation import LEAST_POINTS, saturation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import saturation as world

TOKENS = np.arange(1, 51) * 80e9


def noisy(curve, deviation=0.004, seed=0):
    return curve + np.random.default_rng(seed).normal(0, deviation, len(curve))


def kneed(knee=1.2e12, left=0.05):
    x, k = np.log(TOKENS), np.log(knee)
    return 3 - 0.3 * (np.minimum(x, k) - x[0]) - 0.3 * left * np.maximum(x - k, 0)


def test_a_knee_is_found_with_its_interval():
    found = saturation(TOKENS, noisy(kneed()), better="lower")
    assert found.knee is not None and found.knee.tokens == pytest.approx(1.2e12, rel=0.1)
    assert found.knee.low <= 1.2e12 <= found.knee.high < 1.5e12
    assert found.state == "saturated" and found.confidence > 0.9
    assert "knee at 1." in found.reason


@pytest.mark.parametrize("exponent", [0.05, 0.2, 0.4])
def test_a_power_law_flattens_but_has_no_knee(exponent):
    found = saturation(TOKENS, noisy(2 + 3 * (TOKENS / TOKENS[0]) ** -exponent), better="lower")
    assert found.knee is None and found.state in ("growing", "slowing")


def test_a_learning_rate_that_falls_makes_no_knee():
    curve = 3 - 0.1 * np.log(TOKENS / TOKENS[0]) - 0.1 * (TOKENS > 2.4e12)
    assert saturation(TOKENS, noisy(curve), better="lower").knee is None


def test_a_straight_line_grows_at_its_rate():
    found = saturation(TOKENS, noisy(30 + 5 * np.log2(TOKENS / TOKENS[0]), 0.2), better="higher")
    assert found.state == "growing" and found.share == pytest.approx(1, abs=0.2)
    assert found.rate == pytest.approx(5, abs=4 * found.rate_error) and found.rate_error < 1
    assert found.noise == pytest.approx(0.2, rel=0.4)


def test_noise_alone_says_nothing():
    found = saturation(TOKENS, noisy(np.full(len(TOKENS), 2.5)), better="lower")
    assert found.state == "unknown" and found.knee is None and "above the noise" in found.reason


def test_a_constant_or_a_short_trajectory_says_nothing():
    assert saturation(TOKENS, np.full(len(TOKENS), 2.0), better="lower").state == "unknown"
    few = LEAST_POINTS - 1
    assert str(LEAST_POINTS) in saturation(TOKENS[:few], kneed()[:few], better="lower").reason
    assert saturation([], [], better="lower").state == "unknown"


def test_an_outlier_moves_nothing_far():
    values = noisy(kneed())
    values[[9, 30]] += 0.3
    found = saturation(TOKENS, values, better="lower")
    assert found.knee is not None and found.knee.tokens == pytest.approx(1.2e12, rel=0.1)


def test_nan_is_an_error_that_names_the_domain():
    values = kneed()
    values[7] = float("nan")
    with pytest.raises(DataError, match="not a number") as error:
        saturation(TOKENS, values, better="lower", what="held-out loss of science")
    assert "held-out loss of science, at 640,000,000,000 tokens" in error.value.render()


@settings(max_examples=6, deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3), st.integers(-8, 3))
def test_units_change_nothing(scale, shift, decades):
    values = noisy(kneed())
    plain = saturation(TOKENS, values, better="lower")
    other = saturation(TOKENS * 10.0**decades, shift - scale * values, better="higher")
    assert other.state == plain.state and other.knee is not None and plain.knee is not None
    assert other.knee.tokens == pytest.approx(plain.knee.tokens * 10.0**decades, rel=0.02)
    assert other.rate == pytest.approx(plain.rate * scale, rel=0.02, abs=1e-3 * plain.rate_error * scale)


def counted(count):
    rng = np.random.default_rng(17)
    found = [world.is_found(t, world.asked(t)) for t in (world.with_knee(rng) for _ in range(count))]
    alarms = [
        world.asked(world.without_knee(rng, world.WITHOUT[i % 5])).knee is not None for i in range(count)
    ]
    return np.mean(found), np.mean(alarms)


def test_knees_of_the_simulated_world_are_found_and_no_others():
    found, alarms = counted(15)
    assert found >= 0.8 and alarms <= 0.1


@pytest.mark.long
def test_knees_of_many_simulated_trajectories():
    found, alarms = counted(400)
    assert found >= 0.95 and alarms <= 0.05
