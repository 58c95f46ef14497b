"""Which steps are left of a run, and which ends its stage, where its journal passes over some."""

from __future__ import annotations

from megatron_davinci.data import Journal, MixRecord, SkipRecord
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.left import ended_unevaluated, ends_stage, last_taken, skip_of, steps_left
from tests.tiny import tiny_config


def test_steps_that_are_passed_over_are_not_left_and_do_not_end_a_stage(tmp_path):
    config = tiny_config(tmp_path)
    schedule = Schedule(config.curriculum, config.data.sequence_length)
    journal = Journal.in_memory()
    journal.append(MixRecord(0, "first", {"a": "0.75", "b": "0.25"}))
    whole = list(steps_left(schedule, journal, 0, 0, schedule.total_steps))
    assert [plan.step for plan in whole] == list(range(1, schedule.total_steps + 1))
    assert all(ends_stage(schedule, journal, plan) == plan.ends_stage for plan in whole)
    assert last_taken(schedule, 0) is None
    assert all(last_taken(schedule, plan.first_sample + plan.batch) == plan for plan in whole)

    last = [plan for plan in whole if plan.stage == 0][-2:]
    for plan in last:  # a sample of each
        journal.append(SkipRecord(plan.first_sample + 1, plan.first_sample + 2, "health"))
    journal.append(SkipRecord(whole[-1].first_sample, schedule.total_samples, "health"))
    out = {plan.step for plan in (*last, whole[-1])}
    left = list(steps_left(schedule, journal, 0, 0, schedule.total_steps))
    assert [plan.step for plan in left] == [plan.step for plan in whole if plan.step not in out]
    assert {plan.step for plan in whole if skip_of(journal, plan)} == out
    ends = [plan.step for plan in left if ends_stage(schedule, journal, plan)]
    assert ends[0] == last[0].step - 1 and ends[-1] == whole[-2].step
    assert len(ends) == len({plan.stage for plan in whole})
    evaluations = tmp_path / "evals.jsonl"
    evaluations.write_text('{"step": 3}\n')
    before = last[0].first_sample
    assert ended_unevaluated(schedule, journal, before, evaluations).step == last[0].step - 1
    assert ended_unevaluated(schedule, journal, before - last[0].batch, evaluations) is None
    evaluations.write_text(f'{{"step": 3}}\n{{"step": {last[0].step - 1}}}\n')
    assert ended_unevaluated(schedule, journal, before, evaluations) is None
    consumed = whole[-2].first_sample + whole[-2].batch
    assert list(steps_left(schedule, journal, whole[-2].step, consumed, schedule.total_steps)) == []
