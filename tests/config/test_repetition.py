"""A cap on repetition is kept by the whole list of stages, or said with the line that sets it."""

from __future__ import annotations

import pytest

from megatron_davinci.config import load_config
from megatron_davinci.errors import ConfigError
from tests.config import small

SIZES = {"web": 1000, "code": 100}


def settings(caps, sizes=SIZES, mixtures=({"web": 0.9, "code": 0.1}, {"web": 0.5, "code": 0.5})):
    whole = small.settings()
    for name, size in sizes.items():
        whole["data"]["sources"][name]["tokens"] = size
    first = whole["curriculum"][0]
    whole["curriculum"] = [
        {**first, "name": f"s{number}", "tokens": 400, "mixture": mixture, "max_epochs": cap}
        for number, (mixture, cap) in enumerate(zip(mixtures, caps, strict=True))
    ]
    return whole


def refused(tmp_path, *arguments, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(small.write(tmp_path, settings(*arguments, **changes)))
    return str(caught.value)


def test_what_stages_take_is_counted_from_the_run_s_beginning(tmp_path):
    # 40 tokens of code in the first stage, 200 in the second: 2.4 passes.
    for caps in ({}, {"code": 2.4}), (0.4, 2.4), ({"code": 0.4, "all": 1}, {"all": 2.4}), ({}, {"web": 0.56}):
        load_config(small.write(tmp_path, settings(caps)))
    text = refused(tmp_path, ({"code": 0.3}, {"code": 2.39}))
    assert "has 2 problems" in text
    assert "curriculum.0.max_epochs.code (line" in text
    assert "by the end of stage s0 the mixtures take 40 tokens of code, 0.4 passes through its 100" in text
    assert "by the end of stage s1 the mixtures take 240 tokens of code, 2.4 passes through its 100" in text
    assert "at most 2.39 passes are allowed" in text
    assert "curriculum.1.max_epochs.all (line" in refused(tmp_path, ({}, 2))


def test_a_domain_s_cap_is_each_of_its_sources(tmp_path):
    whole = settings(({}, {"text": 2}))
    for name in ("web", "code"):
        whole["data"]["sources"][name]["domain"] = "text"
    with pytest.raises(ConfigError, match=r"(?s)has a problem.*max_epochs.text .*240 tokens of code"):
        load_config(small.write(tmp_path, whole))
    # A source's own cap is stronger than its domain's.
    whole["curriculum"][1]["max_epochs"]["code"] = 3
    load_config(small.write(tmp_path, whole))


def test_of_sizes_that_nobody_declares_nothing_is_said_yet(tmp_path):
    load_config(small.write(tmp_path, settings((0.1, 0.1), sizes={})))
    assert "tokens of web" not in refused(tmp_path, ({}, 0.1), sizes={"code": 100})


@pytest.mark.parametrize(
    ("cap", "message"),
    [
        (
            {"cod": 2},
            "): cod is no source and no domain; did you mean code?",
        ),
        ({"zzz": 2}, "zzz is no source and no domain; there are code, web"),
        (0, "the cap of all is not above 0; found 0. A weight of 0 ends its use"),
        ({"web": -1}, "the cap of web is not above 0"),
        ("four", "should be a valid number, unable to parse string as a number; found 'four'"),
        (True, "number; found True"),
    ],
)
def test_caps_that_cannot_be(tmp_path, cap, message):
    assert message in refused(tmp_path, ({}, cap))
