"""The plan says what a run will cost before anything starts."""

from pathlib import Path

import pytest

from megatron_davinci.config import load_config
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.plan import plan_run

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
    assert plan.stages[3].source_tokens["qa"] == pytest.approx(0.7 * 10**12, rel=1e-4)
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
