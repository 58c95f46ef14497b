"""The schedule is a function of the clock, and agrees with taking the steps one by one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_davinci.config import load_config
from megatron_davinci.config.curriculum import Stage
from megatron_davinci.optim.schedule import Schedule

EXAMPLES = Path(__file__).parents[2] / "examples"


def stage(name="s", tokens=1000, batches=(4,), **rate) -> Stage:
    """`batches` are (size, steps) pairs, the last one a size alone."""
    phases = [{"size": size, "steps": steps} for size, steps in batches[:-1]] + [{"size": batches[-1]}]
    return Stage.model_validate(
        {
            "name": name,
            "tokens": tokens,
            "mixture": {"web": 1},
            "global_batch_size": phases,
            "learning_rate": {"peak": 1.0, **rate},
        }
    )


def walk(schedule: Schedule) -> list:
    plans, consumed = [], 0
    while consumed < schedule.total_samples:
        plans.append(schedule.at(consumed))
        consumed += plans[-1].batch
    assert consumed == schedule.total_samples
    return plans


def simulate(stages: list[Stage], length: int) -> list[tuple]:
    """Takes step after step as the rules are told: (stage, first sample, batch, learning rate, ends the stage)."""
    taken, consumed, target = [], 0, 0
    for index, settings_ in enumerate(stages):
        target += settings_.tokens
        sizes = [p.size for p in settings_.global_batch_size for _ in range(p.steps or 0)]
        inside: list[list[int]] = []
        while consumed * length < target:
            size = sizes[len(inside)] if len(inside) < len(sizes) else settings_.global_batch_size[-1].size
            inside.append([consumed, size])
            consumed += size
        rate = settings_.learning_rate
        for k, (sample, size) in enumerate(inside):
            if k < rate.warmup_steps:
                value = rate.warmup_from + (rate.peak - rate.warmup_from) * (k + 1) / rate.warmup_steps
            elif rate.shape == "constant":
                value = rate.peak
            else:
                begin, last = inside[rate.warmup_steps][0], inside[-1][0]
                done = (sample - begin) / (last - begin) if last > begin else 0.0
                if rate.shape == "cosine":
                    done = (1 - math.cos(math.pi * done)) / 2
                value = rate.peak + (rate.end - rate.peak) * done
            taken.append((index, sample, size, value, k == len(inside) - 1))
    return taken


rates = st.one_of(
    st.fixed_dictionaries({"shape": st.just("constant")}),
    st.fixed_dictionaries({"shape": st.sampled_from(["linear", "cosine"]), "end": st.floats(0, 2)}),
).flatmap(
    lambda shape: st.fixed_dictionaries(
        {
            **{key: st.just(value) for key, value in shape.items()},
            "peak": st.floats(0, 2),
            "warmup_steps": st.integers(0, 12),
            "warmup_from": st.floats(0, 2),
        }
    )
)
batches = st.tuples(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), max_size=3), st.integers(1, 40)
).map(lambda drawn: (*drawn[0], drawn[1]))
stages = st.lists(
    st.tuples(st.integers(1, 600), batches, rates).map(
        lambda drawn: stage(tokens=drawn[0], batches=drawn[1], **drawn[2])
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stages=stages, length=st.integers(1, 9))
def test_it_agrees_with_taking_the_steps_one_by_one(stages, length):
    schedule = Schedule(stages, length)
    expected = simulate(stages, length)
    plans = walk(schedule)
    assert [plan.step for plan in plans] == list(range(1, len(expected) + 1))
    assert schedule.total_steps == len(expected)
    for plan, (index, sample, size, value, ends) in zip(plans, expected, strict=True):
        assert (plan.stage, plan.first_sample, plan.batch, plan.ends_stage) == (index, sample, size, ends)
        assert plan.stage_name == stages[index].name
        assert plan.learning_rate == pytest.approx(value, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stages=stages, length=st.integers(1, 9), data=st.data())
def test_nothing_begins_between_two_steps(stages, length, data):
    schedule = Schedule(stages, length)
    boundaries = {plan.first_sample for plan in walk(schedule)}
    sample = data.draw(st.integers(-2, schedule.total_samples + 2))
    if sample in boundaries:
        assert schedule.at(sample).first_sample == sample
    else:
        with pytest.raises(ValueError, match=r"not a step boundary|no step begins"):
            schedule.at(sample)


def test_the_davinci_recipe_is_the_reports():
    config = load_config(EXAMPLES / "davinci_3b" / "config.yaml")
    schedule = Schedule(config.curriculum, config.data.sequence_length)
    steps = [sum(segment.steps for segment in schedule.stage_segments(index)) for index in range(4)]
    assert steps == [310_919, 119_209, 59_605, 59_605]
    assert schedule.total_samples == 1_953_128_448
    assert schedule.total_steps == sum(steps)
    # 8T tokens, and less than one global batch more.
    assert 0 <= schedule.total_samples * 4096 - 8 * 10**12 < 4096 * 4096
    first, last = schedule.at(0), schedule.at(schedule.total_samples - 4096)
    assert (first.batch, first.learning_rate) == (1024, pytest.approx(3e-4 / 2000))
    assert (last.batch, last.learning_rate, last.ends_stage) == (4096, 3e-5, True)


def test_the_batch_ramp_changes_where_it_says():
    plans = walk(Schedule([stage(tokens=80, batches=((1, 3), (2, 2), 4))], 1))
    assert [plan.batch for plan in plans] == [1, 1, 1, 2, 2, *[4] * 19]


def test_warm_up_reaches_the_peak_with_its_last_step():
    plans = walk(Schedule([stage(tokens=40, peak=1.0, warmup_steps=4, warmup_from=0.2)], 1))
    assert [plan.learning_rate for plan in plans[:5]] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_last_step_of_a_stage_arrives_at_the_end(shape):
    plans = walk(Schedule([stage(tokens=44, shape=shape, peak=3.0, end=0.5, warmup_steps=2)], 1))
    rates = [plan.learning_rate for plan in plans]
    assert rates[1] == 3.0 and rates[2] == 3.0 and rates[-1] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    middle = rates[2 + len(rates[2:]) // 2]
    assert middle == pytest.approx(1.75), "both shapes are halfway in the middle"


def test_a_stage_that_an_earlier_one_overshot_has_no_step():
    schedule = Schedule([stage("a", 10, (100,)), stage("b", 20, (5,)), stage("c", 100, (10,))], 1)
    plans = walk(schedule)
    assert [plan.stage_name for plan in plans] == ["a", *["c"] * 3]
    assert plans[0].ends_stage
    assert schedule.stage_segments(1) == []
    assert schedule.stage_first_sample(1) is None
    assert [schedule.stage_first_sample(index) for index in (0, 2)] == [0, 100]


def test_an_overshoot_is_not_added_to_the_next_stage():
    # Stage a ends at 12 instead of 10; the run still ends at the first boundary at or after 20.
    schedule = Schedule([stage("a", 10, (4,)), stage("b", 10, (4,))], 1)
    assert schedule.total_samples == 20
    assert schedule.stage_first_sample(1) == 12


def test_it_costs_the_same_anywhere_in_a_run_of_trillions():
    schedule = Schedule([stage(tokens=10**18, batches=((1, 10**6), 3))], 1)
    assert len(schedule.segments) == 2
    plan = schedule.at(10**6 + 3 * 10**15)
    assert plan.step == 10**6 + 10**15 + 1
