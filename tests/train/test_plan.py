"""The plan says what a run will cost before anything starts."""

import re
import shlex
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_davinci.config import load_config, validate
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.data import Journal
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.platform.device import choose
from megatron_davinci.train.introduction import introduction
from megatron_davinci.train.laws import fresh_equivalent, last_pass_worth, step_law
from megatron_davinci.train.plan import plan_run
from megatron_davinci.train.plan_cost import choose_gpu
from megatron_davinci.train.plan_sources import planned_order
from megatron_davinci.train.planned import open_sources
from tests.config import small
from tests.tiny import LENGTH, tiny_config, tiny_settings

CONFIG = Path("examples/davinci_3b/config.yaml")


@pytest.fixture(scope="module")
def config():
    return load_config(CONFIG)


def test_the_report_s_recipe(config):
    plan = plan_run(config, 256)
    assert plan.parameters == 3_085_938_688
    assert [stage.steps for stage in plan.stages] == [310_919, 119_209, 59_605, 59_605]
    assert plan.total_samples == 1_953_128_448
    assert plan.total_tokens == plan.total_samples * 4096 >= 8 * 10**12
    assert plan.flops_per_token == pytest.approx(20.3e9, rel=0.01)
    assert plan.stages[0].batch == [1024, 2048, 4096]
    assert plan.stages[1].learning_rate == pytest.approx((3e-4, 3e-5))
    assert plan.stages[3].domain_tokens["qa"] == pytest.approx(0.7 * 10**12, rel=1e-4)
    assert sum(plan.stages[3].source_tokens.values()) == plan.stages[3].tokens
    assert plan.total_steps == Schedule(config.curriculum, 4096).total_steps


def test_memory_falls_as_the_layout_spreads(config):
    one = plan_run(config, 1).memory
    assert one.weights == pytest.approx(2 * 3.086e9, rel=0.001)
    assert one.optimizer == pytest.approx(12 * 3.086e9, rel=0.001)
    sharded = plan_run(config, 64).memory
    assert sharded.optimizer * 64 == pytest.approx(one.optimizer, rel=0.01)
    split = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": 2})})
    assert plan_run(split, 64).memory.weights < 0.51 * one.weights
    assert plan_run(split, 64).memory.total < sharded.total


def test_context_parallel_ranks_share_what_a_sequence_takes(config):
    one = plan_run(config, 64).memory
    split = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context": 2})})
    two = plan_run(split, 64).memory
    assert two.logits * 2 == one.logits
    # Each has the keys and values of the whole sequence.
    assert 0.5 * one.activations < two.activations < 0.52 * one.activations
    assert (two.weights, two.optimizer) == (one.weights, one.optimizer)


def test_an_impossible_layout_is_said_before_anything_starts(config):
    with pytest.raises(ConfigError, match="impossible"):
        plan_run(config, 100)


# ---- sources -----------------------------------------------------------------------------------------------


def test_the_pool_is_table_2_of_the_report(config):
    sources = config.data.sources
    assert len(sources) == 28
    pools = dict.fromkeys(("general", "code", "science", "qa"), 0)
    for name, source in sources.items():
        pools[config.data.domain(name)] += source.tokens
    billions = {domain: tokens / 10**9 for domain, tokens in pools.items()}
    assert billions == {"general": 4280, "code": 598, "science": 1943, "qa": 734.4}
    levels = dict(re.findall(r"^    (\w+): +{path.*# L(\d)", CONFIG.read_text(), re.MULTILINE))
    assert set(levels) == set(sources)
    # In which sub-stages each is drawn from, as the table marks it.
    marks = dict(
        re.findall(r"^    (\w+): +{path.*# L\d +([-12 ]*|in the pool.*)$", CONFIG.read_text(), re.MULTILINE)
    )
    for source in plan_run(config, 256).sources:
        drawn = [stage.name for stage, tokens in zip(config.curriculum, source.tokens) if tokens]
        assert drawn == ([] if "unused" in marks[source.name] else marks[source.name].split()), source.name


def test_what_is_repeated_is_warned_of(config):
    plan = plan_run(config, 256)
    first, *others = plan.warnings
    assert first.startswith("REPEATED MORE THAN 4 TIMES: 9 sources of qa")
    for part in (
        "runs out in stage 2-1",
        "4.13 passes (1.24 in 2-1, 2.89 in 2-2)",
        "worth 3.83 passes of new text",
    ):
        assert part in first
    assert any(said.startswith("nemotron_cc_diverse_qa: in data.sources, and no stage") for said in others)
    assert sum("4 sources of code" in said and "1.57 passes" in said for said in others) == 1
    assert not any("nemotron_cc:" in said or "nemotron_cc (" in said for said in plan.warnings), (
        "0.96 passes are none"
    )


def test_two_passes_are_worth_a_word_and_four_are_not_shouted(tmp_path):
    def warned(tokens):
        whole = small.settings()
        whole["data"]["sources"]["web"]["tokens"] = 1601
        whole["curriculum"] = [{**whole["curriculum"][0], "mixture": {"web": 1}, "tokens": tokens}]
        return plan_run(validate(whole, where="test"), 1).warnings

    assert warned(1600) == ["code: in data.sources, and no stage takes from it"]
    assert warned(1664)[0] == "web (1.6k): runs out in stage one; 1.04 passes (1.04 in one)"
    assert "worth" not in warned(3200)[0]
    assert "2.08 passes (2.08 in one); worth 2.04 passes" in warned(3328)[0]
    assert "REPEATED" not in warned(6400)[0]
    assert warned(6464)[0].startswith("REPEATED MORE THAN 4 TIMES: web (1.6k)")


def test_a_warm_up_that_a_stage_is_too_short_for_is_warned_of_by_the_plan_and_by_the_run(tmp_path):
    settings = tiny_settings(tmp_path)
    settings["curriculum"][1]["learning_rate"] = {"peak": 4e-3, "warmup_steps": 40}
    config = validate(settings, where="test")
    warning = (
        "stage second: its warm-up is longer than its 20 steps: the learning rate ends at 2.00e-03 and never "
        "comes to the peak, 4.00e-03"
    )
    plan = plan_run(config, 1)
    assert warning in plan.warnings and plan.stages[1].learning_rate == (1e-4, 2e-3)
    order = SimpleNamespace(schedule=Schedule(config.curriculum, LENGTH), journal=Journal.in_memory())
    said = introduction(config, choose("cpu", 1), plan.layout, order, (0, 0, 50), None, [])
    assert f"Warning: {warning}" in list(said)


def test_a_share_too_small_for_one_sample_is_warned_of():
    whole = small.settings()
    whole["curriculum"][0] |= {"mixture": {"web": 0.999, "code": 0.001}, "tokens": 256}
    plan = plan_run(validate(whole, where="test"), 1)
    assert any(said.startswith("code: no sample in the whole of stage one") for said in plan.warnings)
    assert any("says the size; epochs are not known" in said for said in plan.warnings)
    later = {**whole["curriculum"][0], "name": "two", "tokens": 16}
    whole["curriculum"].append(later)
    whole["curriculum"][0]["tokens"] = 272
    swallowed = plan_run(validate(whole, where="test"), 1)
    assert any(said.startswith("stage two has no step") for said in swallowed.warnings)


def test_sources_that_are_there_say_their_own_size(tmp_path):
    config = tiny_config(tmp_path)
    plan = plan_run(config, 1)
    opened = open_sources(config)
    for source in plan.sources:
        assert (source.pool, source.known_from) == (opened[source.name].num_tokens, "manifest")
        assert source.epochs[-1] == sum(source.tokens) / (opened[source.name].num_windows * LENGTH)


def test_a_plan_that_passes_a_cap_is_refused(config):
    settings = {"max_epochs": {"qa": 4}}
    stages = [*config.curriculum[:3], config.curriculum[3].model_copy(update=settings)]
    with pytest.raises(
        ConfigError, match=r"(?s)repeat a source.*curriculum.3.max_epochs.qa.*569B.*4.125 passes"
    ):
        plan_run(config.model_copy(update={"curriculum": stages}), 256)
    with pytest.raises(ConfigError, match=r"curriculum.3.max_epochs.qa .*4.12. passes through its 138B"):
        load_config(CONFIG, ["curriculum.3.max_epochs={qa: 4}"])


@pytest.mark.parametrize("n", [123_456_789, 1_500_000_001, 1_953_128_448])
def test_each_source_has_given_its_share_at_any_sample(config, n):
    """The data order of the planned run, against shares that are added up exactly."""
    schedule = Schedule(config.curriculum, 4096)
    order, pools, _ = planned_order(config, schedule)
    shares = dict.fromkeys(order.sources, Fraction(0))
    for number, stage in enumerate(config.curriculum):
        segments = schedule.stage_segments(number)
        samples = min(n, segments[-1].end_sample) - segments[0].first_sample
        for source, weight in source_weights(stage, config.data, pools).items():
            shares[source] += max(0, samples) * Fraction(weight)
    consumed = order.consumed(n)
    assert sum(consumed.values()) == n
    assert max(abs(consumed[source] - shares[source]) for source in shares) < 3


# ---- laws and costs ----------------------------------------------------------------------------------------


def test_the_step_law_is_the_paper_s():
    rate, batch = step_law(2_774_773_760, 4 * 10**12)
    assert (rate, batch) == (pytest.approx(2.45e-3, rel=0.01), pytest.approx(9.1e6, rel=0.01))
    rate, batch = step_law(10**9, 10**11)
    assert (rate, batch) == (pytest.approx(1.63e-3, rel=0.01), pytest.approx(1.11e6, rel=0.02))


def test_repeated_text_is_worth_what_the_law_says():
    worth = {epochs: fresh_equivalent(epochs) / epochs for epochs in (1, 2, 4, 8, 16, 40)}
    assert worth == pytest.approx({1: 1, 2: 0.98, 4: 0.93, 8: 0.83, 16: 0.66, 40: 0.38}, abs=0.006)
    assert fresh_equivalent(0.4) == 0.4
    step = 1e-6
    for epochs in (1.5, 4.0, 20.0):
        slope = (fresh_equivalent(epochs + step) - fresh_equivalent(epochs)) / step
        assert slope == pytest.approx(last_pass_worth(epochs), rel=1e-4)


def test_hours_follow_from_flops_peak_and_utilization(config):
    plan = plan_run(config, 256, choose_gpu("H100", None, None), 0.5)
    assert plan.cost.gpu_hours == pytest.approx(
        plan.flops_per_token * plan.total_tokens / (989e12 * 0.5) / 3600
    )
    assert plan.cost.wall_hours * 256 == pytest.approx(plan.cost.gpu_hours)
    assert sum(stage.cost.gpu_hours for stage in plan.stages) == pytest.approx(plan.cost.gpu_hours)
    assert choose_gpu("h100", 500, 64).teraflops == 500
    with pytest.raises(ConfigError, match="a100"):
        choose_gpu("h9000", None, None)


def test_a_checkpoint_is_weights_and_what_the_optimizer_has_in_fp32(config):
    plan = plan_run(config, 256)
    assert plan.checkpoint_bytes == 3_085_938_688 * (2 + 4 + 8)
    assert plan.checkpoint_space == 4 * plan.checkpoint_bytes
    more = config.checkpoint.model_copy(update={"keep_best": 2, "every_steps": 600, "keep_every": 900})
    more_of_them = plan_run(config.model_copy(update={"checkpoint": more}), 256)
    forever = plan.total_steps // 1800
    assert forever > 1 and more_of_them.checkpoint_space == (4 + 2 + forever) * plan.checkpoint_bytes


def test_snapshots_take_the_optimizer_s_state_twice_and_parity(config):
    plan = plan_run(config, 64)
    assert plan.snapshot_bytes == 0
    settings = config.snapshots.model_copy(update={"every_steps": 10, "parity_nodes": 5})
    plan = plan_run(config.model_copy(update={"snapshots": settings}), 64)
    assert plan.snapshot_bytes == pytest.approx(2 * plan.memory.optimizer * 5 / 4, abs=4)


def test_each_alternative_of_the_report_is_a_configuration():
    """The lines of overrides at the end of the recipe, as a shell would read them."""
    lines = [line for line in CONFIG.read_text().splitlines() if re.match(r"#   curriculum\.", line)]
    assert len(lines) >= 14
    for line in lines:
        plan = plan_run(load_config(CONFIG, shlex.split(line.lstrip("# "))), 256)
        assert plan.total_samples > 10**9
