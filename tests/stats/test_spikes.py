"""Spikes: found where they are, not where a run only falls, scatters or changes; a function of the steps alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.stats.spikes import SpikeWindow, expected_next
from tests.cases import cases


def window_of(losses, norms, regime="a", **settings):
    window = SpikeWindow(**{"window": 64, "least": 16, "deviations": 8.0, **settings})
    for loss, norm in zip(losses, norms, strict=True):
        window.add(float(loss), float(norm), regime)
    return window


@pytest.fixture
def noise():
    return np.random.default_rng(3).normal(0, 1, (2, 64))


def test_a_loss_and_a_norm_that_jump_are_spikes_and_are_told_apart(noise):
    window = window_of(3 + 0.02 * noise[0], 0.5 * np.exp(0.2 * noise[1]))
    assert window.judge(3.05, 0.7, "a") is None
    loss = window.judge(3.5, 0.7, "a")
    assert loss is not None and (loss.of, loss.value) == ("loss", 3.5)
    assert loss.expected == pytest.approx(3, abs=0.02) and 10 < loss.deviations < 50
    norm = window.judge(3.0, 8.0, "a")
    assert norm is not None and norm.of == "grad_norm" and norm.expected == pytest.approx(0.5, rel=0.3)
    assert "gradient norm 8" in str(norm) and "deviations above" in str(norm)


def test_downwards_is_never_a_spike(noise):
    window = window_of(3 + 0.02 * noise[0], 0.5 * np.exp(0.2 * noise[1]))
    assert window.judge(0.1, 1e-9, "a") is None


def test_a_loss_that_falls_steeply_is_no_spike_and_hides_none(noise):
    falling = 9 - 0.05 * np.arange(64) + 0.02 * noise[0]
    window = window_of(falling, np.ones(64))
    assert window.judge(falling[-1] - 0.05, 1.0, "a") is None
    assert window.judge(falling[-1] + 0.5, 1.0, "a") is not None, "half a nat above, in a window that spans 3"


def test_what_hardly_scatters_needs_a_rise_that_is_one(noise):
    window = window_of(np.full(64, 3.0), np.full(64, 0.5))
    assert window.judge(3.05, 0.9, "a") is None
    assert window.judge(3.07, 0.5, "a") is not None
    assert window.judge(3.0, 1.01, "a") is not None


def test_spikes_in_the_window_do_not_hide_the_next(noise):
    losses = 3 + 0.02 * noise[0]
    losses[40:50] += 2
    assert window_of(losses, np.ones(64)).judge(3.6, 1.0, "a") is not None


def test_steps_of_another_stage_are_not_compared(noise):
    window = window_of(3 + 0.02 * noise[0], np.ones(64))
    assert window.judge(5.0, 1.0, "b") is None
    for _ in range(15):
        window.add(5.0, 1.0, "b")
    assert window.judge(9.0, 1.0, "b") is None, "fifteen are too few"
    window.add(5.0, 1.0, "b")
    assert window.judge(9.0, 1.0, "b") is not None


@cases(30)
@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=150), st.floats(0.01, 20), st.integers(0, 100))
def test_only_the_last_steps_count_however_many_came_before(losses, next_loss, before):
    first = window_of([7.0] * before + losses, [1.0] * (before + len(losses)))
    last = ([7.0] * before + losses)[-64:]
    second = window_of(last, [1.0] * len(last))
    assert first.judge(next_loss, 1.0, "a") == second.judge(next_loss, 1.0, "a")


@cases(50)
@given(st.lists(st.floats(-5, 5), min_size=8, max_size=130))
def test_the_medians_are_numpys(values):
    level, scatter = expected_next(values)
    count, half = len(values), len(values) // 2
    slope = (np.median(values[count - half :]) - np.median(values[:half])) / (count - half)
    off = np.array(values) - slope * (np.arange(count) - (count - 1))
    assert level == pytest.approx(np.median(off[-max(8, count // 4) :]), abs=1e-9)
    assert scatter == pytest.approx(1.4826 * np.median(np.abs(off - np.median(off))), abs=1e-9)
