"""What a run records of a mixture of domains: shares of its sources by what they hold."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from megatron_davinci.errors import DataError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.forecast import Forecast, open_sources, pool_sizes, stage_record
from tests.tiny import LENGTH, tiny_config, tiny_settings, write_source


@pytest.fixture
def settings(tmp_path):
    """Two sources of one domain in the first stage, one more source in the second."""
    whole = tiny_settings(tmp_path)
    sources = whole["data"]["sources"]
    write_source(tmp_path / "data" / "c", "c", 3, documents=20)
    sources["c"] = {"path": str(tmp_path / "data" / "c")}
    for name in ("b", "c"):
        sources[name]["domain"] = "rest"
    first, second = whole["curriculum"]
    whole["curriculum"] = [
        {**first, "mixture": {"a": 0.25, "rest": 0.75}},
        {**second, "mixture": {"rest": {"share": 1, "weights": {"b": 1, "c": 3}}}},
    ]
    return whole


def test_a_stage_s_record_divides_a_domain_by_what_its_sources_hold(tmp_path, settings):
    config = tiny_config(tmp_path, **settings)
    pools = pool_sizes(config, open_sources(config))
    manifests = {name: json.loads((tmp_path / "data" / name / "manifest.json").read_text()) for name in "bc"}
    tokens = {name: sum(shard["tokens"] for shard in manifests[name]["shards"]) for name in "bc"}
    assert {name: pools[name] for name in "bc"} == tokens
    schedule = Schedule(config.curriculum, LENGTH)
    record = stage_record(config, schedule, 0, pools)
    assert record.weights["a"] == "0.25"
    for name in "bc":
        part = Fraction(tokens[name], sum(tokens.values()))
        assert Fraction(record.weights[name]) == Fraction(3, 4) * part
    assert stage_record(config, schedule, 1, pools).weights == {"b": "0.25", "c": "0.75"}
    forecast = Forecast.read(config)
    assert [governing.record for governing in forecast.records] == [
        stage_record(config, schedule, stage, pools) for stage in range(2)
    ]


def test_a_source_of_another_size_than_declared_is_refused(tmp_path, settings):
    held = open_sources(tiny_config(tmp_path, **settings))["b"].num_tokens
    settings["data"]["sources"]["b"]["tokens"] = round(held * 1.03)
    assert pool_sizes(config := tiny_config(tmp_path, **settings), open_sources(config))["b"] == held
    settings["data"]["sources"]["b"]["tokens"] = round(held * 1.2)
    with pytest.raises(DataError, match=rf"data.sources.b.tokens: .* as configured, {held:,} in the source"):
        open_sources(tiny_config(tmp_path, **settings))
