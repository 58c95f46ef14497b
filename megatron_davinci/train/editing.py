"""From what somebody asks for to an edit that the run will take up, or to the reason why it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from pydantic import ValidationError

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.source_weights import mixture_problems, source_weights
from megatron_davinci.errors import ConfigError
from megatron_davinci.train.course import Course
from megatron_davinci.train.edits import Edit, EditFile, Edits, Point
from megatron_davinci.train.outlook import edit_problem, untransformed
from megatron_davinci.train.planned import place_of
from megatron_davinci.train.repetition import check_caps


@dataclass(frozen=True)
class Asked:
    """An edit that has been checked and not been written.

    Attributes:
        edit: It.
        before: The run's course without it.
        after: And with it.
        sample: Where it takes effect, as far as is known now.
    """

    edit: Edit
    before: Course
    after: Course
    sample: int

    def write(self) -> Edit:
        """Ask for it; on disk when this returns.

        Raises:
            EnvironmentProblem: It could not be written.
        """
        file = EditFile(self.before.past.directory.edits)
        return file.add(self.edit.point, self.edit.weights, self.edit.reason, asked=self.edit.asked)


def ask(course: Course, point: Point, mixture: Mapping[str, str], reason: str, *, asked: str) -> Asked:
    """Check an edit.

    Args:
        course: Of the run.
        point: Where it is to take effect.
        mixture: Shares by source or domain, as in a stage of the configuration.
        reason: Why.
        asked: How the point was given, for messages.

    Raises:
        ConfigError: It cannot be: the shares do not sum to 1, a name is unknown, its point is past, a source would
            repeat more often than its cap allows.
    """
    sample = _place(course, point, asked)
    number = course.schedule.at(sample).stage
    stage = course.config.curriculum[number]
    weights = _weights(course, number, stage, mixture)
    edit = Edit(f"edit-{len(course.past.edits.asked) + 1}", point, weights, reason, asked)
    if problem := edit_problem(edit, course.config, course.windows):
        raise ConfigError("This mixture cannot be.", where="--mixture", found=problem)
    if names := untransformed(course.config, stage.name, weights):
        raise ConfigError(
            "A transform of the stage was not made for a source of this mixture.",
            where="--mixture",
            found=f"{', '.join(names)}, which stage {stage.name} does not mix as configured",
            do="change the mixture of the stage in the configuration, and start the run again with it",
        )
    edits = course.past.edits
    after = course.with_edits(Edits((*edits.asked, edit), edits.withdrawn))
    check_caps(course.config, course.schedule, after.curriculum())
    return Asked(edit, course, after, sample)


def withdraw(course: Course, name: str, reason: str) -> Course:
    """Take an edit back that has not taken effect.

    Returns:
        The run's course without it.

    Raises:
        ConfigError: There is no such edit, or it is none that is still to come.
        EnvironmentProblem: It could not be written.
    """
    states = {edit.name: state for edit, state, _ in course.edit_states()}
    edits = course.past.edits
    pending = [edit.name for edit in edits.pending(course.journal.mixes)]
    if name not in pending:
        raise ConfigError(
            "This edit cannot be withdrawn.",
            where=f"--withdraw {name}",
            found=f"{name} is {states[name]}" if name in states else "no such edit",
            expected="one that is planned: " + (", ".join(pending) or "there is none"),
            do="to undo a change that has taken effect, ask for the mixture that was before it",
        )
    EditFile(course.past.directory.edits).withdraw(name, reason)
    return course.with_edits(replace(edits, withdrawn={**edits.withdrawn, name: reason}))


def _place(course: Course, point: Point, asked: str) -> int:
    """Where an edit would take effect."""
    stages = [stage.name for stage in course.config.curriculum]
    if point.stage is not None and point.stage not in stages:
        raise ConfigError(
            "The curriculum has no such stage.", where=asked, found=point.stage, expected=", ".join(stages)
        )
    if course.begins is None:
        raise ConfigError(
            "The run is at its end: no step is left that a mixture could govern.",
            where=course.past.directory.path,
            do="add a stage to the configuration, and start the run again with it",
        )
    begun = {record.stage for record in course.journal.mixes}
    wanted = point.sample
    if point.stage is not None:
        wanted = course.schedule.stage_first_sample(stages.index(point.stage))
    is_past = wanted is not None and wanted < course.begins
    if is_past or (point.stage is not None and point.stage in begun):
        plan = course.schedule.at(course.begins)
        raise ConfigError(
            "This edit would rewrite the past, which is sealed.",
            where=asked,
            found=f"sample {wanted:,}" if point.stage is None else f"stage {point.stage} has begun",
            expected=f"sample {course.begins:,} or later: the present begins at step {plan.step:,} of stage "
            f"{plan.stage_name}, at {course.begins * course.schedule.sequence_length:,} tokens",
            do="ask for --next, or for a later point",
        )
    sample = place_of(Edit("", point, {}, ""), course.schedule, course.begins)
    if sample is None:
        raise ConfigError(
            "No step begins there: the run is over before.",
            where=asked,
            found="a stage without a step" if wanted is None else f"sample {wanted:,}",
            expected=f"up to sample {course.total - 1:,} ({course.schedule.total_steps:,} steps, "
            f"{course.total * course.schedule.sequence_length:,} tokens)",
        )
    return sample


def _weights(course: Course, number: int, stage: Stage, mixture: Mapping[str, str]) -> dict[str, str]:
    """A mixture as a stage would have it, by source."""
    data = course.config.data
    try:
        settings = Stage.model_validate({**stage.model_dump(), "mixture": dict(mixture)})
    except ValidationError as error:
        found = "\n".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ConfigError("This mixture cannot be.", where="--mixture", found=found) from None
    problems = [said for _, said in mixture_problems(number, settings, data)]
    if problems:
        raise ConfigError("This mixture cannot be.", where="--mixture", found="\n".join(problems))
    return source_weights(settings, data, course.pools)


def percent_point(course: Course, percent: Fraction) -> Point:
    """The point where a part of the run is over; `percent` of its samples."""
    return Point(sample=-(-course.total * percent.numerator // (100 * percent.denominator)))


def step_point(course: Course, step: int) -> Point:
    """The point where a step begins.

    Raises:
        ConfigError: The run has no such step.
    """
    schedule = course.schedule
    if not 1 <= step <= schedule.total_steps:
        raise ConfigError(
            "The run has no such step.",
            where="--at-step",
            found=f"{step:,}",
            expected=f"1 to {schedule.total_steps:,}",
        )
    segment = next(one for one in reversed(schedule.segments) if one.first_step < step)
    return Point(sample=segment.first_sample + (step - 1 - segment.first_step) * segment.batch)
