"""What a run records of a mixture of domains: shares of its sources by what they hold."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.edits import EditFile, Point
from megatron_davinci.train.forecast import Forecast
from megatron_davinci.train.order import DataOrder
from megatron_davinci.train.planned import open_sources, pool_sizes, stage_record
from megatron_davinci.train.run_directory import RunDirectory
from tests.ranks import run_ranks
from tests.tiny import LENGTH, tiny_config, tiny_settings, train_here, write_source


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


def test_a_run_that_would_pass_a_cap_does_not_start(tmp_path, settings):
    """The sources say what they hold; nothing is written before the cap is seen to break."""
    config = tiny_config(tmp_path, **settings)
    schedule, sources = Schedule(config.curriculum, LENGTH), open_sources(config)
    forecast = Forecast.read(config)
    taken = forecast.curriculum.consumed(schedule.total_samples)
    # Exactly what the run takes is allowed, and a hair less is not.
    for slack, allowed in ((-1e-6, True), (1e-6, False)):
        settings["curriculum"][1]["max_epochs"] = {"c": taken["c"] / sources["c"].num_windows - slack}
        config = tiny_config(tmp_path, **settings)
        if allowed:
            DataOrder(config, schedule, sources, RunDirectory(tmp_path / "run"))
            continue
        with pytest.raises(ConfigError, match=r"(?s)repeat a source.*curriculum.1.max_epochs.c: by the end"):
            DataOrder(config, schedule, sources, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_change_that_is_asked_for_while_a_run_starts_governs_its_first_step(tmp_path):
    config = tiny_config(tmp_path)
    schedule = Schedule(config.curriculum, LENGTH)
    (tmp_path / "run").mkdir()
    order = DataOrder(config, schedule, open_sources(config), RunDirectory(tmp_path / "run"))
    order.seal()
    for sample in (0, 4, 8):  # read ahead, and nothing is decided
        order.prepare(schedule.at(sample))
    EditFile(tmp_path / "run" / "edits.jsonl").add(Point(), {"b": "1"}, "early")
    first = schedule.at(0)
    assert order.edited() and order.revise(first, lambda: None, edited=True)
    order.prepare(first)
    order.commit(first)
    assert [(mix.first_sample, mix.origin) for mix in order.journal.mixes] == [(0, "edit-1")]
    assert order.curriculum.consumed(12) == {"a": 0, "b": 12}


def test_a_stage_s_weight_decay_and_evaluations_take_effect(tmp_path):
    """Two runs that say the same by other keys: what holds everywhere in one is the other's exception."""

    def settings_of(name, decay):
        """Twelve steps, then ten."""
        settings = tiny_settings(
            tmp_path, optimizer={"weight_decay": decay}, run={"directory": str(tmp_path / name)}
        )
        for stage, steps in zip(settings["curriculum"], (12, 10), strict=True):
            stage |= {"tokens": steps * 4 * LENGTH, "global_batch_size": 4}
        return settings

    settings = settings_of("own", 0.0)
    settings["evaluation"] = {"every_steps": 5, "sequences": 4}
    settings["curriculum"][0] |= {"weight_decay": 0.7, "evaluate_every_steps": 0}
    settings["curriculum"][1] |= {"evaluate_every_steps": 4}
    run_ranks(1, train_here, settings)
    same = settings_of("same", 0.7)
    same["curriculum"][1] |= {"weight_decay": 0.0}
    run_ranks(1, train_here, same)
    run_ranks(1, train_here, settings_of("plain", 0.0))

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert losses("own") == losses("same"), "neither run took the optimizer's decay in both stages"
    assert losses("own") != losses("plain"), "the first stage's decay is taken"
    evaluated = [
        json.loads(line)["step"] for line in (tmp_path / "own" / "evals.jsonl").read_text().splitlines()
    ]
    assert evaluated == [12, 16, 20, 22], "at each stage's end, and every fourth step of the second"
