"""Pickles are read by what they say, and nothing that they name is looked up anywhere but in a table."""

from __future__ import annotations

import contextlib
import datetime
import pickle
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.platform.safe_pickle import Named, NotPlain, read_plain

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner) | st.tuples(inner)
    ),
    max_leaves=20,
)


@settings(max_examples=50)
@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_back(value: object, protocol: int) -> None:
    # Before protocol 3 bytes are written as a call.
    known = {"_codecs.encode": lambda text, coding: text.encode(coding), "__builtin__.bytes": bytes}
    content = pickle.dumps(value, protocol)
    assert read_plain(content, known) == value


@given(st.sets(st.integers()), st.lists(st.integers()))
def test_sets_and_values_that_are_shared(numbers: set[int], shared: list[int]) -> None:
    value = {"set": numbers, "frozen": frozenset(numbers), "twice": [shared, shared]}
    found = read_plain(pickle.dumps(value))
    assert found == value and found["twice"][0] is found["twice"][1]


def test_a_name_is_an_error_or_stands_for_itself() -> None:
    content = pickle.dumps([datetime.timedelta(1), OrderedDict(a=1), datetime.date])
    with pytest.raises(NotPlain, match=r"the name datetime\.timedelta"):
        read_plain(content)
    with pytest.raises(NotPlain, match=r"the name collections\.OrderedDict"):
        read_plain(content, inert=lambda name: name.startswith("datetime."))
    delta, ordered, date = read_plain(content, {"collections.OrderedDict": dict}, inert=lambda name: True)
    assert delta == Named("datetime.timedelta", (1, 0, 0)) and ordered == {"a": 1}
    assert date == Named("datetime.date")


@given(st.binary(max_size=60))
def test_bytes_that_are_no_pickle(content: bytes) -> None:
    with contextlib.suppress(NotPlain):
        read_plain(content)


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93X\x04\x00\x00\x00true\x85R.",
        b"\x80\x02]N\x85R.",  # a call of a list
        b"\x80\x02N}b.",  # attributes of None
        b"\x80\x02\x82\x01.",  # an extension that is registered
    ],
)
def test_calls_of_all_kinds_are_refused(content: bytes) -> None:
    with pytest.raises(NotPlain):
        read_plain(content)
