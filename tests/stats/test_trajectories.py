"""Signal against noise, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_davinci.stats.trajectories import signal_to_noise


def test_it_is_the_span_over_the_jumps_of_the_last_checkpoints():
    values = [1.0, 2.0, 4.0, 5.0, 6.0, 5.0, 4.0]
    last = [4.0, 5.0, 6.0, 5.0, 4.0]
    mean, deviation = 27 / 7, math.sqrt(sum((x - 4.8) ** 2 for x in last) / 4)
    assert signal_to_noise(values) == pytest.approx((5.0 / mean) / (deviation / 4.8))


def test_more_noise_at_the_end_makes_it_smaller_and_none_makes_it_infinite():
    noise = np.random.default_rng(0).normal(0, 1, 5)
    rise = np.linspace(1, 10, 10)
    ratios = [signal_to_noise([*rise, *(10 + size * noise)]) for size in (0.1, 0.5, 1.0)]
    assert ratios == sorted(ratios, reverse=True)
    assert signal_to_noise([1.0, *[2.0] * 5]) == math.inf


def test_too_few_checkpoints_say_nothing():
    assert math.isnan(signal_to_noise([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert math.isnan(signal_to_noise([0.0] * 7))
