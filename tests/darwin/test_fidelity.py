"""The gates of level 4: each violation is named, and what a faithful model does is none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.fidelity import violations
from tests.darwin.making import prose

SOURCE = """The temper-
ature rose from 5 km to 7.5 °C in 2014, as Müller (1999) showed. The sample did not melt at 300 K,
which eleven laboratories have conﬁrmed with great care.

Page 88

We have $E = mc^2$ and x = 3 for H2O, so the energy follows from the mass of the sample alone.

```python
print(1)
```

Click here to subscribe to our newsletter."""
CLEAN = """\
The temperature rose from 5 km to 7.5 °C in 2014, as Müller (1999) showed. The sample did not melt at 300 K,
which eleven laboratories have confirmed with great care.

We have $E=mc^2$ and x = 3 for H2O, so the energy follows from the mass of the sample alone.

```python
print(1)
```"""


def test_faithful_repairs_pass():
    assert violations(SOURCE, CLEAN, "purify") == []
    assert violations(SOURCE, CLEAN, "reorganise") == []
    assert violations(SOURCE, SOURCE, "purify") == []
    other = CLEAN.replace("5 km", "5 kilometres").replace("eleven", "11").replace("300 K", "300\u00a0K")
    assert violations(SOURCE, other, "purify") == []


@pytest.mark.parametrize(
    "old,new,name",
    [
        ("7.5", "7.6", "added_number"), ("eleven", "twelve", "added_number"), ("H2O", "H2O2", "added_number"),
        ("2014", "2,014.5", "added_number"), ("5 km", "5 m", "changed_unit"), ("300 K", "300", "changed_unit"),
        ("7.5 °C", "7.5 °F", "changed_unit"), ("$E=mc^2$", "$E=mc^3$", "added_formula"),
        ("$E=mc^2$ and", "", "dropped_formula"), ("x = 3", "3", "dropped_formula"),
        ("print(1)", "print(2)", "changed_code"), ("```python\nprint(1)\n```", "", "changed_code"),
        ("Müller", "Miller", "new_name"), ("alone.", "alone. Hartwell disagrees.", "new_name"),
        ("did not", "did", "changed_negation"),
        ("alone.", "alone. Hydrogen bonds between adjacent layers explain such behaviour.", "added_claim"),
        ("We have", "Here is the cleaned text: We have", "speaks_of_the_task"),
        ("alone.", "alone " + "and so it goes on and on without any end " * 9, "repetition"),
        (CLEAN, "", "dropped_prose"), (CLEAN, "Müller", "too_short"), (CLEAN, CLEAN + CLEAN, "too_long"),
    ],
)  # fmt: skip
def test_each_violation_is_named(old, new, name):
    assert old in CLEAN
    assert name in violations(SOURCE, CLEAN.replace(old, new), "purify")


@pytest.mark.parametrize(
    "said,other",
    [
        ("p < .05", "p < .01"), ("version 1.2.3", "version 1.2.9"), ("v1.2", "v1.3"), ("10.5.2020", "10.5.2021"),
        ("Llama-3.1", "Llama-3.3"), ("see Fig.2", "see Fig.7"), ("CO₂", "CO₃"), ("x₁", "x₉"), ("10⁵", "10⁶"),
        ("10⁻⁵", "10⁵"), ("10^{-5}", "10^{5}"), ("2½ cups", "2¼ cups"),
    ],
)  # fmt: skip
def test_numbers_are_seen_however_they_are_written(said, other):
    text = (
        f"The amount of the substance in all of the rooms was found to be {said} by every one of the teams."
    )
    assert violations(text, text, "purify") == []
    assert violations(text, text.replace(said, other), "purify") == ["added_number"]


@pytest.mark.parametrize(
    "said,mended",
    [
        (".05", "0.05"),
        ("Fig.2", "Fig. 2"),
        ("CO₂", "CO2"),
        ("10⁵", "10^5"),
        ("½ cup", "1/2 cup"),
    ],
)
def test_another_way_to_write_a_number_is_a_repair(said, mended):
    text = (
        f"The amount of the substance in all of the rooms was found to be {said} by every one of the teams."
    )
    assert violations(text, text.replace(said, mended), "purify") == []


def test_reorganising_may_regroup_but_not_lose_numbers():
    first, *rest = re.split(r"(?<=\.) ", CLEAN.split("\n\n")[0])
    turned = CLEAN.replace(CLEAN.split("\n\n")[0], " ".join([*rest, first]))
    assert violations(SOURCE, turned, "reorganise") == []
    fewer = CLEAN.replace(
        CLEAN.split("\n\n")[0], "The sample did not melt, which laboratories have confirmed."
    )
    assert "dropped_numbers" in violations(SOURCE, fewer, "reorganise")


PIECES = [chunk.text for text in prose()[:60] for chunk in cut(text, 250)]
ODDITIES = [
    "5 km",
    "$x$",
    "``",
    "```",
    "-\n",
    "Ärger",
    "1e9",
    "−3",
    "\ud800",
    "= ",
    "    x = 1\n",
    "\\[a\\]",
    "not ",
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.sampled_from(ODDITIES), max_size=4).map("".join))
def test_a_text_is_faithful_to_itself(text):
    assert violations(text, text, "purify") == [] and violations(text, text, "reorganise") == []


@pytest.mark.parametrize("word", ["A" * 20_000, "1," * 10_000, "." * 20_000, "\\x0a" * 5_000])
def test_words_without_end_take_no_time(word):
    """A small model's answers are at times one letter over and over."""
    for task in ("purify", "reorganise"):
        assert isinstance(violations(f"Some text. {word}", f"Some text. {word}", task), list)
