"""The section `health`: what it refuses, and how."""

import pytest
import yaml

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.tiny import tiny_settings


@pytest.mark.parametrize(
    ("health", "says"),
    [
        ({"not_finite": "ignore"}, "health.not_finite"),
        ({"not_finit": "skip"}, "did you mean not_finite?"),
        ({"grace_seconds": 0}, "health.grace_seconds"),
        ({"give_up_after": 0}, "health.give_up_after"),
        ({"give_up_within_steps": True}, "health.give_up_within_steps"),
        ({"spikes": {"policy": "halt"}}, "health.spikes.policy"),
        ({"spikes": {"window": 8}}, "health.spikes.window"),
        ({"spikes": {"least": 64, "window": 32}}, "least (64) exceeds window (32)"),
        ({"spikes": {"deviations": float("nan")}}, "health.spikes.deviations"),
        ({"hang": {"times_longest_step": 1}}, "health.hang.times_longest_step"),
        ({"hang": {"least_seconds": "soon"}}, "health.hang.least_seconds"),
        ({"hang": {"unknown_seconds": 0}}, "health.hang.unknown_seconds"),
    ],
)
def test_what_it_refuses_is_named(health, says, tmp_path):
    with pytest.raises(ConfigError) as error:
        validate(tiny_settings(tmp_path, health=health), "config.yaml")
    assert says in str(error.value)


def test_off_may_be_written_as_yaml_reads_it(tmp_path):
    health = yaml.safe_load("spikes: {policy: off}")
    assert validate(tiny_settings(tmp_path, health=health), "config.yaml").health.spikes.policy == "off"


def test_hangs_may_be_left_to_the_collectives(tmp_path):
    assert validate(tiny_settings(tmp_path, health={"hang": None}), "config.yaml").health.hang is None
    settings = tiny_settings(tmp_path, health={"hang": {"unknown_seconds": None}})
    assert validate(settings, "config.yaml").health.hang.unknown_seconds is None
