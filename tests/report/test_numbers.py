"""Numbers on a page have sensible digits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.report.numbers import (
    duration,
    number,
    percent,
    quantity,
    scientific,
    tick,
    tick_labels,
    with_minus,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999.6, "1k"),
        (10_000, "10k"),
        (2e6, "2M"),
        (1.25e9, "1.25B"),
        (999_999, "1M"),
        (4e12, "4T"),
        (8.04e12, "8.04T"),
        (-2500, "−2.5k"),
        (1e15, "1000T"),
        (3e38, "3e38"),
        (math.nan, "–"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


@given(st.floats(1, 9e14))
def test_a_quantity_reads_back_within_its_digits(value: float) -> None:
    text = quantity(value)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * scale == pytest.approx(value, rel=6e-3)
    assert len(text) <= 5


@pytest.mark.parametrize(
    ("value", "text"), [(3.41234, "3.412"), (0.0512, "0.05120"), (0, "0"), (2e-5, "2e-5"), (-1.5, "−1.500")]
)
def test_measured_values(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(3e-4, "3e-4"), (2.954e-5, "2.95e-5"), (0, "0"), (1.5, "1.5")])
def test_learning_rates(value: float, text: str) -> None:
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.734, "0.73 s"),
        (45, "45 s"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (8040, "2 h 14 min"),
        (273_600, "3 d 4 h"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_shares_and_ticks() -> None:
    assert percent(0.682) == "68.2%"
    assert percent(math.nan) == "–"
    assert [tick(v) for v in (0, 0.5, 3e-4, 2500, 2e9)] == ["0", "0.5", "3e-4", "2.5k", "2B"]


def test_a_minus_sign_is_put_before_numbers_only() -> None:
    said = "half-rate-2 web-2024: -0.5 (-0.7 to -.3), p 1e-05"
    assert with_minus(said) == "half-rate-2 web-2024: −0.5 (−0.7 to -.3), p 1e-05"


def test_no_two_ticks_are_labelled_alike() -> None:
    assert tick_labels([0, 0.5, 3e-4, 2500, 2e9]) == ["0", "0.5", "3e-4", "2.5k", "2B"]
    assert tick_labels([21500, 21500.5, 21501]) == ["21.5k", "21.5005k", "21.501k"]
    assert tick_labels([1e-4, 1.0002e-4, 1.0004e-4]) == ["1e-4", "1.0002e-4", "1.0004e-4"]
    assert tick_labels([3.0, 3.0000002]) == ["3", "3.0000002"]
