"""The schedule is a function of the clock, and agrees with taking the steps one by one."""

from __future__ import annotations

import itertools
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
    """`batches` are (size, steps) or (size, count, unit), the last one a size alone."""
    phases = [{"size": size, (unit or ["steps"])[0]: count} for size, count, *unit in batches[:-1]]
    return Stage.model_validate(
        {
            "name": name,
            "tokens": tokens,
            "mixture": {"web": 1},
            "global_batch_size": [*phases, {"size": batches[-1]}],
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
        phases, inside = list(settings_.global_batch_size), []
        due, steps_here = consumed * length, 0
        while consumed * length < target:
            # Which phases are over? Each takes up where the one before was to end.
            while len(phases) > 1:
                phase = phases[0]
                if phase.steps is not None:
                    if steps_here < phase.steps:
                        break
                    due = consumed * length
                else:
                    end = due + (phase.tokens if phase.tokens is not None else phase.samples * length)
                    if consumed * length < end:
                        break
                    due = end
                phases.pop(0)
                steps_here = 0
            inside.append([consumed, phases[0].size])
            consumed += phases[0].size
            steps_here += 1
        taken += [
            (index, sample, size, rate_of(settings_.learning_rate, inside, k, length), k == len(inside) - 1)
            for k, (sample, size) in enumerate(inside)
        ]
    return taken


def rate_of(rate, inside: list, k: int, length: int) -> float:
    """The learning rate of step `k` of a stage whose steps are `inside`, by looking at all of them."""
    first = inside[0][0]
    if rate.warmup_tokens is None:
        warm = min(rate.warmup_steps, len(inside))
        done = (k + 1) / rate.warmup_steps if k < warm else None
    else:
        warm = sum(1 for sample, _ in inside if (sample - first) * length < rate.warmup_tokens)
        done = min(1, (sum(inside[k]) - first) * length / rate.warmup_tokens) if k < warm else None
    if done is not None:
        return rate.warmup_from + (rate.peak - rate.warmup_from) * done
    last, begin = inside[-1][0], inside[warm][0]
    if rate.shape == "constant":
        return rate.peak
    if rate.decay_steps is not None:
        begin = max(begin, inside[max(0, len(inside) - 1 - rate.decay_steps)][0])
    elif rate.decay_tokens is not None:
        begin = max(begin, last - math.ceil(rate.decay_tokens / length))
    done = (inside[k][0] - begin) / (last - begin) if last > begin else 0.0
    if done <= 0:
        return rate.peak
    shape = (rate.decay or "1-sqrt") if rate.shape == "wsd" else rate.shape
    if shape == "exponential":
        return math.exp((1 - done) * math.log(rate.peak) + done * math.log(rate.end))
    done = {"cosine": (1 - math.cos(math.pi * done)) / 2, "1-sqrt": math.sqrt(done), "linear": done}[shape]
    return rate.peak + (rate.end - rate.peak) * done


lengths = st.one_of(
    st.fixed_dictionaries({"warmup_steps": st.integers(0, 12)}),
    st.fixed_dictionaries({"warmup_tokens": st.integers(1, 90)}),
)
shapes = st.one_of(
    st.fixed_dictionaries({"shape": st.just("constant")}),
    st.fixed_dictionaries(
        {"shape": st.sampled_from(["linear", "cosine", "1-sqrt"]), "end": st.floats(0.001, 2)}
    ),
    st.fixed_dictionaries(
        {
            "shape": st.just("wsd"),
            "end": st.floats(0.001, 2),
            "decay": st.sampled_from([None, "linear", "cosine", "1-sqrt", "exponential"]),
        },
        optional={},
    ).flatmap(
        lambda drawn: st.sampled_from(["decay_steps", "decay_tokens"]).flatmap(
            lambda unit: st.integers(1, 60).map(lambda count: {**drawn, unit: count})
        )
    ),
)
rates = st.tuples(shapes, lengths, st.floats(0.001, 2), st.floats(0, 2)).map(
    # Without a warm-up there is nothing to begin.
    lambda drawn: (
        {**drawn[0], **drawn[1], "peak": drawn[2]}
        | ({"warmup_from": drawn[3]} if any(drawn[1].values()) else {})
    )
)
batches = st.tuples(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 60), st.sampled_from(["steps", "tokens", "samples"])).map(
            lambda phase: (phase[0], min(phase[1], 6) if phase[2] == "steps" else phase[1], phase[2])
        ),
        max_size=3,
    ),
    st.integers(1, 40),
).map(lambda drawn: (*drawn[0], drawn[1]))
stages = st.lists(
    st.tuples(st.integers(150, 700), batches, rates).map(
        lambda drawn: stage(tokens=drawn[0], batches=drawn[1], **drawn[2])
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stages=stages, length=st.integers(1, 9), data=st.data())
def test_a_step_is_a_function_of_the_samples_alone(stages, length, data):
    """Not of what was asked before, in which order, or of what object is asked."""
    plans = walk(Schedule(stages, length))
    fresh = Schedule(stages, length)
    for plan in data.draw(st.permutations(plans)):
        assert fresh.at(plan.first_sample) == plan
    # And later stages decide nothing about earlier ones.
    alone = walk(Schedule(stages[:1], length))
    assert plans[: len(alone)] == alone


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tokens=st.integers(150, 600), batches=batches, rate=rates, length=st.integers(1, 9))
def test_a_rate_arrives_exactly_and_takes_no_leap_on_the_way(tokens, batches, rate, length):
    one = stage(tokens=tokens, batches=batches, **rate)
    plans, shape = walk(Schedule([one], length)), one.learning_rate
    low, high = sorted((shape.peak, shape.end if shape.end is not None else shape.peak))
    low, high = min(low, shape.warmup_from), max(high, shape.warmup_from)
    found = [plan.learning_rate for plan in plans]
    assert all(low * (1 - 1e-12) <= rate <= high * (1 + 1e-12) for rate in found)
    warm = [plan for plan in plans if in_warmup(plan, shape, length)]
    rest = plans[len(warm) :]
    if warm and rest:
        assert warm[-1].learning_rate == shape.peak, "the step that ends the warm-up has the peak"
    if len(rest) > 1 and shape.end is not None:
        assert rest[0].learning_rate == shape.peak
        assert rest[-1].learning_rate == shape.end
        falling = 1 if shape.end <= shape.peak else -1
        steps = [falling * (a.learning_rate - b.learning_rate) for a, b in itertools.pairwise(rest)]
        assert all(step >= -1e-12 for step in steps), "from peak to end it never turns back"
        # No leap: a step's part of the way is no more than its shape allows over the samples that it goes.
        begin = max(
            [plan.first_sample for plan in rest if plan.learning_rate == shape.peak] or [rest[0].first_sample]
        )
        way, gap = abs(shape.peak - shape.end), max(plan.batch for plan in rest)
        part = min(1.0, gap / max(1, rest[-1].first_sample - begin))
        assert max(steps) <= way * max(math.sqrt(2 * part), math.pi * part, steepest(shape, part)) + 1e-9


def in_warmup(plan, shape, length) -> bool:
    if shape.warmup_tokens is None:
        return plan.step <= shape.warmup_steps
    return plan.first_sample * length < shape.warmup_tokens


def steepest(shape, part: float) -> float:
    """How much of its way an exponential decay can go in a part of its length."""
    if shape.decay != "exponential" or shape.peak == shape.end:
        return 0.0
    ratio = max(shape.peak, shape.end) / min(shape.peak, shape.end)
    return min(1.0, (ratio ** min(1.0, 2 * part) - 1) / (1 - 1 / ratio))


@pytest.mark.parametrize("decay", ["linear", "cosine", "1-sqrt", "exponential"])
def test_warm_up_stable_decay(decay):
    one = stage(
        tokens=1000,
        batches=(10,),
        shape="wsd",
        peak=2.0,
        end=0.5,
        warmup_steps=10,
        decay=decay,
        decay_steps=20,
    )
    found = [plan.learning_rate for plan in walk(Schedule([one], 1))]
    assert found[9:80] == [2.0] * 71, "the step before the decay is at the peak"
    assert found[80] < 2.0 and found[-1] == 0.5
    middle = {"linear": 1.25, "cosine": 1.25, "1-sqrt": 2.0 - 1.5 * math.sqrt(0.5), "exponential": 1.0}
    assert found[89] == pytest.approx(middle[decay])
    same = stage(
        tokens=1000,
        batches=(10,),
        shape="wsd",
        peak=2.0,
        end=0.5,
        warmup_tokens=100,
        decay=decay,
        decay_tokens=200,
    )
    assert [plan.learning_rate for plan in walk(Schedule([same], 1))] == pytest.approx(found)


def test_phases_in_tokens_and_samples_end_where_they_say():
    # 30 tokens in steps of 4 samples of 2 are 4 steps, 2 tokens too many, which the next phase has less.
    one = stage(tokens=400, batches=((4, 30, "tokens"), (3, 11, "samples"), (5, 2), 6))
    assert [plan.batch for plan in walk(Schedule([one], 2))][:12] == [4] * 4 + [3] * 4 + [5] * 2 + [6] * 2
    # 8 steps of 8 tokens; a phase that lies inside what an earlier step took has none.
    none = stage(tokens=400, batches=((40, 10, "tokens"), (3, 10, "samples"), 6))
    assert [plan.batch for plan in walk(Schedule([none], 1))][:3] == [40, 6, 6]


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


def test_a_stage_that_is_too_short_for_its_warm_up_or_its_decay_says_so():
    def said(steps, **rate):
        return Schedule([stage(tokens=steps * 4 * 10, **rate)], 10).cut_rates()

    assert said(7, warmup_steps=7) == [] and said(7, shape="cosine", end=1e-4, warmup_steps=5) == []
    [line] = said(4, peak=1e-3, warmup_steps=8)
    assert line.startswith(
        "stage s: its warm-up is longer than its 4 steps: the learning rate ends at 5.00e-04"
    )
    [line] = said(7, shape="cosine", end=1e-4, warmup_steps=6)
    assert line == "stage s: no step is left for the learning rate to fall to its end, 1.00e-04"
    wsd = {"shape": "wsd", "end": 1e-4, "warmup_steps": 3}
    assert said(7, **wsd, decay_steps=4) == []
    assert said(7, **wsd, decay_steps=5) == ["stage s: of its 7 steps 4 are left for a decay of 5"]
    # Tokens of a stage are what it was given; an overshoot of the one before takes steps from it.
    stages = [stage("a", 45), stage("b", 75, warmup_tokens=75)]
    assert [line[:29] for line in Schedule(stages, 10).cut_rates()] == ["stage b: its warm-up is longe"]


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
