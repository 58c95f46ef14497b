"""A mixture of domains becomes exact shares of sources, whatever order the configuration is written in."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.config import load_config, validate
from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.source_weights import exact_text, mixed_sources, source_weights
from megatron_davinci.errors import ConfigError
from tests.config import small

DOMAINS = {"web": "general", "books": "general", "c4": "general", "git": "code", "se": "code", "qa": "qa"}
POOLS = {"web": 300, "books": 100, "c4": 200, "git": 30, "se": 10, "qa": 7}


def data(domains=DOMAINS, **changes) -> DataConfig:
    sources = {name: {"path": name, "domain": domain} for name, domain in domains.items()}
    return DataConfig.model_validate({"sequence_length": 16, "sources": sources, **changes})


def stage(mixture) -> Stage:
    return Stage.model_validate(
        {
            "name": "s",
            "tokens": 100,
            "mixture": mixture,
            "global_batch_size": 1,
            "learning_rate": {"peak": 1},
        }
    )


def weights(mixture, pools=POOLS, domains=DOMAINS):
    return source_weights(stage(mixture), data(domains), pools)


def test_a_domain_is_divided_by_the_sizes_of_its_pools():
    assert weights({"general": 0.6, "code": 0.3, "qa": 0.1}) == {
        "books": "0.1",
        "c4": "0.2",
        "git": "0.225",
        "qa": "0.1",
        "se": "0.075",
        "web": "0.3",
    }


def test_what_is_no_short_decimal_is_a_fraction():
    assert weights({"general": "0.7", "qa": "0.3"}) == {
        "books": "7/60",
        "c4": "7/30",
        "qa": "0.3",
        "web": "0.35",
    }


def test_a_source_with_a_share_of_its_own_has_no_part_in_its_domain():
    assert weights({"general": 0.9, "web": 0.1}) == {"books": "0.3", "c4": "0.6", "web": "0.1"}
    assert weights({"general": 1, "web": 0}) == {"books": "1/3", "c4": "2/3", "web": "0"}


def test_a_domain_s_sources_may_be_named_and_weighted():
    only = {"share": 0.5, "sources": ["web", "c4"]}
    assert weights({"general": only, "code": "0.5"}) == {
        "c4": "0.2",
        "git": "0.375",
        "se": "0.125",
        "web": "0.3",
    }
    own = {"share": 0.5, "weights": {"web": 3, "c4": "1", "books": 0}}
    assert weights({"general": own, "qa": 0.5}) == {"c4": "0.125", "qa": "0.5", "web": "0.375"}
    assert weights({"general": {"share": 1, "weights": {"web": 2}}}) == {"web": "1"}


def test_temperature_brings_pools_closer():
    def shares(temperature):
        found = weights({"general": {"share": 1, "temperature": temperature}})
        assert sum(map(Fraction, found.values())) == 1
        return [float(Fraction(found[name])) for name in ("books", "c4", "web")]

    assert shares(1) == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    roots = [size**0.5 for size in (100, 200, 300)]
    assert shares(2) == pytest.approx([root / sum(roots) for root in roots], abs=1e-11)
    assert shares(1e6) == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert shares(0.5) == pytest.approx([1 / 14, 4 / 14, 9 / 14])
    # Exact text: the same on every machine, and so written here.
    assert weights({"code": {"share": 1, "temperature": 3}}) == {
        "git": "0.590541436814",
        "se": "0.409458563186",
    }


def test_pools_need_not_be_known_where_they_decide_nothing():
    assert weights({"qa": 0.5, "web": 0.25, "se": 0.25}, pools={}) == {
        "qa": "0.5",
        "se": "0.25",
        "web": "0.25",
    }
    assert mixed_sources(stage({"general": 0.5, "code": 0, "qa": 0.5}), data()) == [
        "books",
        "c4",
        "qa",
        "web",
    ]
    with pytest.raises(ConfigError, match=r"(?s)size is not known.*no `tokens` of books, c4"):
        weights({"general": 1}, pools={"web": 1})


def test_weights_of_sources_stay_the_text_that_they_are():
    assert weights({"web": "0.50", "qa": "1/2", "se": 0}) == {"qa": "1/2", "se": "0", "web": "0.50"}


sizes = st.integers(1, 10**13)


@settings(max_examples=150, deadline=None)
@given(
    pools=st.fixed_dictionaries(dict.fromkeys(DOMAINS, sizes)),
    parts=st.lists(st.integers(0, 10**4), min_size=3, max_size=3).filter(any),
    temperature=st.none() | st.floats(0.2, 50),
    order=st.randoms(use_true_random=False),
)
def test_shares_are_exact_and_know_no_order(pools, parts, temperature, order):
    shares = {
        name: f"{part}/{sum(parts)}" for name, part in zip(("general", "code", "qa"), parts, strict=True)
    }
    mixture = {
        **shares,
        "general": {"share": shares["general"], "temperature": temperature},
    }
    found = weights(mixture, pools)
    assert sum(map(Fraction, found.values())) == 1
    assert list(found) == sorted(found)
    for domain, share in shares.items():
        of_domain = [Fraction(found.get(name, "0")) for name in DOMAINS if DOMAINS[name] == domain]
        assert sum(of_domain) == Fraction(share)
    if temperature is None and Fraction(shares["general"]):
        assert Fraction(found["web"]) * pools["books"] == Fraction(found["books"]) * pools["web"]

    def shuffled(mapping):
        return dict(order.sample(list(mapping.items()), len(mapping)))

    assert weights(shuffled(mixture), shuffled(pools), shuffled(DOMAINS)) == found


@settings(max_examples=200, deadline=None)
@given(share=st.fractions(0, 1, max_denominator=10**30))
def test_text_of_a_share_is_read_back_as_it(share):
    assert Fraction(exact_text(share)) == share


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0"), (1, "1"), ("1/8", "0.125"), ("1/3", "1/3"), ("1/20", "0.05"), ("7/1000", "0.007")],
)
def test_decimals_are_written_as_decimals(share, text):
    assert exact_text(Fraction(share)) == text


# ---- what a mixture may not say --------------------------------------------------------------------------


def refused(tmp_path, *mixtures, domains=DOMAINS, **changes) -> str:
    whole = small.settings()
    sources = {name: {"path": name, "domain": domain} for name, domain in domains.items()}
    whole["data"]["sources"] = sources
    first = whole["curriculum"][0]
    whole["curriculum"] = [
        {**first, "name": f"stage{number}", "mixture": mixture, **changes}
        for number, mixture in enumerate(mixtures)
    ]
    path = small.write(tmp_path)
    # Written without aliases, so that each key has a line of its own.
    path.write_text(yaml.safe_dump(json.loads(json.dumps(whole)), sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    lines = path.read_text().splitlines()
    for line in text.splitlines():
        if "(line " in line:
            key, number = line.split(" (line ")
            last = key.split(".")[-1]
            written = lines[int(number.split(")")[0]) - 1]
            assert "missing" in line or last.isdigit() or last in written, f"{line!r} is not at {written!r}"
    return text


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            {"genral": 1},
            "mixes genral; data.sources has web, books, c4, git, se, qa; domains are code, general; did you mean ge",
        ),
        (
            {"general": {"share": 1, "sources": ["wbe"]}},
            "wbe is no source of domain general; did you mean web?",
        ),
        (
            {"general": {"share": 1, "weights": {"qa": 1}}},
            "qa is no source of domain general; it has books, c4",
        ),
        ({"general": {"share": 0.5, "sources": ["web"]}, "web": 0.5}, "web has a share of its own"),
        ({"general": 0.5, "web": 0.25, "c4": 0.25, "books": 0}, "every source of domain general has a share"),
        ({"web": {"share": 1}}, "web is a source of domain general, so there is nothing to divide"),
        ({"general": {"share": 1, "weights": {"web": 1}, "temperature": 2}}, "leave out `temperature`"),
        ({"general": {"share": 1, "weights": {"web": 1}, "sources": ["web"]}}, "leave out `sources`"),
        ({"general": {"share": 1, "weights": {"web": 0}}}, "one of the weights has to be above 0"),
        ({"general": {"share": 1, "weights": {"web": -1}}}, "the weight of web is negative"),
        ({"general": {"share": 1, "temperature": 0}}, "greater than 0"),
        ({"general": {"share": 1, "sources": []}}, "at least 1 item"),
        ({"general": {"share": 1, "sources": ["web", "web"]}}, "names one twice"),
        ({"general": {"sources": ["web"]}}, "general.share (line"),
        ({"general": {"share": 1, "sorces": ["web"]}}, "unknown key; did you mean sources?"),
        ({"general": {"share": 0.7}, "qa": 0.2}, "the weights sum to 0.9, not to 1"),
        ({"general": None}, "should be a valid string"),
        ({"general": [0.5]}, "should be a valid string"),
    ],
)
def test_a_mixture_of_domains_that_cannot_be(tmp_path, mixture, message):
    assert message in refused(tmp_path, mixture)


def test_a_name_that_may_mean_two_things_is_asked_about(tmp_path):
    both = {"qa": "qa", "faq": "qa"}
    assert "qa is a source, and a domain with faq: for the domain write `qa: {share: 1}`" in refused(
        tmp_path, {"qa": 1}, domains=both
    )
    assert weights({"qa": 1, "faq": 0}, domains=both) == {"faq": "0", "qa": "1"}
    assert weights({"qa": {"share": 1}}, {"qa": 1, "faq": 3}, both) == {"faq": "0.75", "qa": "0.25"}


def test_all_that_is_wrong_is_said_at_once_with_its_line(tmp_path):
    text = refused(
        tmp_path,
        {"genral": 1},
        {"general": {"share": 1, "sources": ["wbe", "qa"]}},
        {"general": 0.5},
        tokens="some",
        learning_rate={"peak": -1},
    )
    # Stages that are wrong in themselves keep nothing from being said of the others.
    assert "has 7 problems" in text, text
    good = small.settings()["curriculum"][0]["learning_rate"]
    text = refused(
        tmp_path,
        {"genral": 1},
        {"general": {"share": 1, "sources": ["wbe", "qa"]}},
        {"general": 0.5},
        learning_rate=good,
    )
    assert "has 4 problems" in text
    for said in ("curriculum.0.mixture.genral (line", "wbe is no", "qa is no", "sum to 0.5"):
        assert said in text


def test_an_override_is_named_where_it_says_what_is_wrong(tmp_path):
    path = small.write(tmp_path)
    for override, said in [
        ("curriculum.0.mixture={web: 0.5, code: 0.4}", "curriculum.0.mixture (command line): the weights"),
        (
            "curriculum.0.mixture.web=0.5",
            "(line 23; command line, 'curriculum.0.mixture.web=0.5'): the weights",
        ),
        (
            "curriculum.0.mixture={wbe: 1}",
            "(command line, 'curriculum.0.mixture={wbe: 1}'): curriculum stage one",
        ),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(path, [override])
        assert said in str(caught.value)


def test_a_configuration_with_domains_is_dumped_and_read_back(tmp_path):
    from megatron_davinci.config import dump_config

    whole = small.settings()
    whole["data"]["sources"] = {
        "a": {"path": "a", "domain": "d", "tokens": "2B"},
        "b": {"path": "b", "domain": "d"},
    }
    whole["curriculum"][0]["mixture"] = {"d": {"share": 1, "temperature": 2}}
    config = validate(whole, where="test")
    assert load_config(small.write(tmp_path, dump_config(config))) == config
