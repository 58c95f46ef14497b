"""Which steps a run has left: those of its schedule that its journal does not pass over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_davinci.data.journal import Journal, SkipRecord
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.train.run_directory import read_lines


def skip_of(journal: Journal, plan: StepPlan) -> SkipRecord | None:
    """The skip that leaves out a sample of a step, if one does. Such a step is not taken, as a whole.

    The clock runs through it: no other step moves, changes its samples, or its learning rate.
    """
    end = plan.first_sample + plan.batch
    for skip in journal.skips:
        if skip.from_sample < end and plan.first_sample < skip.to_sample:
            return skip
    return None


def steps_left(
    schedule: Schedule, journal: Journal, step: int, sample: int, last_step: int
) -> Iterator[StepPlan]:
    """The steps that are left, in their order; what the journal says is asked as each comes.

    Args:
        schedule: The run's.
        journal: Likewise.
        step: The last one that was taken.
        sample: The first that it left.
        last_step: The one to end with.
    """
    while step < last_step:
        plan = schedule.at(sample)
        if skip_of(journal, plan) is None:
            yield plan
        step, sample = plan.step, sample + plan.batch


def ends_stage(schedule: Schedule, journal: Journal, plan: StepPlan) -> bool:
    """Whether a step is its stage's last, or all behind it are passed over."""
    if plan.ends_stage or not journal.skips:
        return plan.ends_stage
    after = plan.first_sample + plan.batch
    following = next(steps_left(schedule, journal, plan.step, after, schedule.total_steps), None)
    return following is None or following.stage != plan.stage


def last_taken(schedule: Schedule, consumed_samples: int) -> StepPlan | None:
    """The step that left off at a sample; None before the first."""
    if not consumed_samples:
        return None
    segment = [one for one in schedule.segments if one.first_sample < consumed_samples][-1]
    return schedule.at(consumed_samples - segment.batch)


def ended_unevaluated(
    schedule: Schedule, journal: Journal, consumed_samples: int, evaluations: Path
) -> StepPlan | None:
    """The step that left off at a sample, where it ended its stage and was not evaluated.

    Args:
        schedule: The run's.
        journal: Likewise.
        consumed_samples: The sample.
        evaluations: The run's `evals.jsonl`.
    """
    last = last_taken(schedule, consumed_samples)
    if last is None or not ends_stage(schedule, journal, last):
        return None
    return None if any(line["step"] == last.step for line in read_lines(evaluations)) else last
