"""Token counts are read as people write them, exactly, and nothing else is taken for one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.config.units import format_tokens, parse_tokens


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("4T", 4 * 10**12),
        ("100B", 10**11),
        ("2.5M", 2_500_000),
        ("300k", 300_000),
        ("300K", 300_000),
        (" 7 m ", 7_000_000),
        ("100_000", 100_000),
        ("1e9", 10**9),
        ("1.5e+3", 1500),
        (4096, 4096),
        (4e12, 4 * 10**12),
        (0, 0),
    ],
)
def test_what_people_write(written, tokens):
    assert parse_tokens(written) == tokens


@settings(deadline=None)
@given(tokens=st.integers(0, 10**18))
def test_a_plain_number_means_itself(tokens):
    assert parse_tokens(tokens) == parse_tokens(str(tokens)) == parse_tokens(f"{tokens:_}") == tokens


@settings(deadline=None)
@given(digits=st.integers(1, 999), suffix=st.sampled_from(["", "k", "M", "B", "T"]))
def test_what_is_written_is_read_back(digits, suffix):
    tokens = parse_tokens(f"{digits}{suffix}")
    assert format_tokens(tokens) == f"{digits}{suffix}"


@settings(deadline=None)
@given(tokens=st.integers(1, 10**15))
def test_three_digits_are_kept(tokens):
    shown = format_tokens(tokens)
    assert abs(parse_tokens(shown) - tokens) <= tokens * 0.00501
    assert "e" not in shown


def test_rounding_carries_into_the_next_unit():
    assert format_tokens(999_600) == "1M"
    assert format_tokens(999_400) == "999k"


@pytest.mark.parametrize(
    "junk",
    [
        "", "T", "4 parsecs", "-1", -1, "1..5", "1e-3", "0x10", "٤T", "4TT", "nan", "inf", float("nan"), float("inf"),
        True, None, [4], {"tokens": 4}, "1e400", "1e999999999", "1e9999999999999999999", 10**19,
    ],
)  # fmt: skip
def test_what_is_not_a_count_is_refused_at_once(junk):
    with pytest.raises(ValueError, match="a token count is a"):
        parse_tokens(junk)


@pytest.mark.parametrize("part", ["0.5", "1.0001k", 0.25, "1.0000000000000000000000000000000001"])
def test_a_part_of_a_token_is_no_token(part):
    with pytest.raises(ValueError, match="whole number"):
        parse_tokens(part)


@settings(deadline=None)
@given(text=st.text(max_size=20))
def test_any_text_is_a_count_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert parse_tokens(text) >= 0


def test_a_long_value_is_not_repeated_in_full():
    with pytest.raises(ValueError) as caught:
        parse_tokens("x" * 100_000)
    assert len(str(caught.value)) < 200
