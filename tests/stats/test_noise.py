"""Noise is measured without knowing the curve, and bad values are named."""

import numpy as np
import pytest

from megatron_davinci.errors import DataError
from megatron_davinci.stats.noise import (
    autocorrelation,
    checked_trajectory,
    difference_noise,
    effective_count,
)

X = np.cumsum(np.random.default_rng(0).uniform(0.5, 1.5, 400))


def smooth(x):
    return 3 - 0.4 * np.log(x) + 0.1 * np.sin(x / 80)


def test_the_deviation_around_an_unknown_curve_is_found():
    found = [
        difference_noise(X, smooth(X) + np.random.default_rng(seed).normal(0, 0.02, len(X)))
        for seed in range(10)
    ]
    assert np.mean(found) == pytest.approx(0.02, rel=0.06)


def test_neither_outliers_nor_a_step_count_as_noise_and_the_plain_deviation_would_count_them():
    rng = np.random.default_rng(1)
    y = smooth(X) + rng.normal(0, 0.02, len(X)) - 0.3 * (X[200] < X)
    y[::40] += 1
    assert difference_noise(X, y) == pytest.approx(0.02, rel=0.25)
    assert np.diff(y).std() / np.sqrt(2) > 0.1


def test_correlated_points_count_for_fewer():
    rng = np.random.default_rng(2)
    residuals = np.zeros(4000)
    for i in range(1, len(residuals)):
        residuals[i] = 0.5 * residuals[i - 1] + rng.normal()
    assert autocorrelation(residuals) == pytest.approx(0.5, abs=0.05)
    assert effective_count(residuals) == pytest.approx(len(residuals) / 3, rel=0.15)
    assert effective_count(rng.normal(size=4000)) == pytest.approx(4000, rel=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_named_with_its_place(bad):
    with pytest.raises(DataError) as error:
        checked_trajectory([100, 200, 3000], [3.0, bad, 2.0], "held-out loss of code")
    assert "held-out loss of code, at 200 tokens" in error.value.render()


@pytest.mark.parametrize("tokens", [[1, 1], [2, 1], [0, 1], [-1, 1], [1, float("inf")]])
def test_positions_rise_from_above_zero(tokens):
    with pytest.raises(DataError, match="above 0"):
        checked_trajectory(tokens, [1, 2], "loss")


def test_lengths_agree():
    with pytest.raises(DataError, match="as many"):
        checked_trajectory([1, 2, 3], [1, 2], "loss")
