"""Drawing fewer points must lose no extreme; labels must never touch."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.report.curves import downsample, smooth, spread


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), most=st.integers(4, 200), log_x=st.booleans())
def test_downsampling_keeps_the_extremes_and_the_ends(n: int, seed: int, most: int, log_x: bool) -> None:
    random = np.random.default_rng(seed)
    x, y = np.sort(random.uniform(1, 1e12, n)), random.standard_cauchy(n)
    kept = downsample(x, y, most, log_x=log_x)
    assert len(kept) <= most
    assert (np.diff(kept) > 0).all()
    assert {kept[0], kept[-1]} == {0, n - 1}
    assert y[kept].max() == y.max() and y[kept].min() == y.min()


def test_downsampling_leaves_a_short_curve_alone() -> None:
    x = np.arange(10.0)
    assert list(downsample(x, x, 10)) == list(range(10))


def test_downsampling_leaves_out_what_cannot_be_drawn() -> None:
    y = np.array([1.0, np.nan, 2.0, np.inf, 3.0])
    assert list(downsample(np.arange(5.0), y, 100)) == [0, 2, 4]
    assert list(downsample(np.arange(5.0), np.ones(5), 100, log_x=True)) == [1, 2, 3, 4]


def test_three_hundred_thousand_steps_become_two_thousand_with_their_one_spike() -> None:
    x, y = np.arange(300_000.0), np.zeros(300_000)
    y[123_457] = 9.0
    kept = downsample(x, y, 2000)
    assert len(kept) <= 2000
    assert 123_457 in kept


def test_smoothing_is_the_mean_of_the_window_and_is_cut_at_the_ends() -> None:
    y = np.array([1.0, 2.0, 6.0, 1.0, 5.0])
    assert smooth(y, 3) == pytest.approx([1.5, 3.0, 3.0, 4.0, 3.0])
    assert smooth(y, 1) == pytest.approx(y)
    assert smooth(y, 99) == pytest.approx([3.0] * 5)


def test_smoothing_steps_over_missing_values_and_over_a_huge_one() -> None:
    y = np.ones(50)
    y[3], y[10] = np.nan, 1e25
    mean = smooth(y, 5)
    assert np.isfinite(mean).all()
    # A running sum would have lost every digit after the spike.
    assert mean[20:] == pytest.approx(1.0)


def test_smoothing_a_million_steps_over_ten_thousand_takes_no_longer_than_a_moment() -> None:
    y = np.random.default_rng(3).normal(size=1_000_000)
    mean = smooth(y, 10_001)
    for at in (0, 4_000, 5_000, 500_000, 999_999):
        assert mean[at] == pytest.approx(y[max(0, at - 5_000) : at + 5_001].mean(), abs=1e-12)


@given(wanted=st.lists(st.floats(-50, 150), max_size=12), gap=st.floats(0.5, 8))
def test_labels_are_apart_inside_and_in_order(wanted: list[float], gap: float) -> None:
    placed = spread(wanted, gap, 0.0, 100.0)
    assert all(-1e-9 <= value <= 100 + 1e-9 for value in placed)
    by_height = sorted(placed)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(by_height))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert order == sorted(order, key=lambda i: placed[i])


def test_labels_that_do_not_touch_stay_where_they_are() -> None:
    assert spread([80.0, 10.0, 40.0], 12, 0, 100) == pytest.approx([80.0, 10.0, 40.0])
    assert spread([50.0, 50.0], 10, 0, 100) == pytest.approx([45.0, 55.0])


def test_more_labels_than_room_are_set_evenly() -> None:
    assert spread([5.0, 5.0, 5.0], 90, 0, 100) == pytest.approx([0.0, 50.0, 100.0])
