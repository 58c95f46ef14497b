"""Stage, batch size and learning rate as pure functions of `consumed_samples`, the run's only clock."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_davinci.config.curriculum import LearningRate, Stage


@dataclass(frozen=True)
class Segment:
    """A stretch of steps of one stage with one batch size.

    Attributes:
        stage: Position of the stage in the curriculum.
        first_sample: Samples consumed before its first step.
        first_step: Steps taken before its first step.
        steps: How many steps it has.
        batch: Sequences a step.
        stage_first_step: Steps taken before the stage's first step.
    """

    stage: int
    first_sample: int
    first_step: int
    steps: int
    batch: int
    stage_first_step: int

    @property
    def end_sample(self) -> int:
        """Samples consumed after its last step."""
        return self.first_sample + self.steps * self.batch


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        step: Number of the step, from 1.
        stage: Position of its stage.
        stage_name: Name of its stage.
        first_sample: The first sample of its global batch.
        batch: Sequences in the global batch.
        learning_rate: The learning rate of its update.
        ends_stage: Whether it is the last step of its stage.
    """

    step: int
    stage: int
    stage_name: str
    first_sample: int
    batch: int
    learning_rate: float
    ends_stage: bool


class Schedule:
    """The whole run, laid out before it starts.

    A stage ends at the first step boundary at or after its cumulative token target, counted from the start of
    the run, so that a stage's overshoot is not added to the next one.

    Args:
        stages: The curriculum.
        sequence_length: Tokens a sample.
    """

    def __init__(self, stages: Sequence[Stage], sequence_length: int) -> None:
        self.stages = list(stages)
        self.sequence_length = sequence_length
        self.segments: list[Segment] = []
        sample = step = target = 0
        for index, stage in enumerate(self.stages):
            target += stage.tokens
            target_samples = -(-target // sequence_length)
            stage_first_step = step
            for phase in stage.global_batch_size:
                needed = max(0, -(-(target_samples - sample) // phase.size))
                steps = needed if phase.steps is None else min(phase.steps, needed)
                if steps:
                    self.segments.append(Segment(index, sample, step, steps, phase.size, stage_first_step))
                    sample += steps * phase.size
                    step += steps
        self.total_samples, self.total_steps = sample, step
        self._first_samples = [segment.first_sample for segment in self.segments]

    def at(self, consumed_samples: int) -> StepPlan:
        """The step that begins after `consumed_samples`.

        Raises:
            ValueError: No step begins there: it is past the end, or not a step boundary.
        """
        position = bisect.bisect_right(self._first_samples, consumed_samples) - 1
        segment = self.segments[position] if position >= 0 else None
        if segment is None or not 0 <= consumed_samples < self.total_samples:
            raise ValueError(f"no step begins at sample {consumed_samples}; the run has {self.total_samples}")
        inside, remainder = divmod(consumed_samples - segment.first_sample, segment.batch)
        if remainder:
            raise ValueError(f"sample {consumed_samples} is not a step boundary (batch {segment.batch})")
        last = position + 1 == len(self.segments) or self.segments[position + 1].stage != segment.stage
        return StepPlan(
            step=segment.first_step + inside + 1,
            stage=segment.stage,
            stage_name=self.stages[segment.stage].name,
            first_sample=consumed_samples,
            batch=segment.batch,
            learning_rate=self._learning_rate(segment, inside),
            ends_stage=last and inside + 1 == segment.steps,
        )

    def stage_segments(self, stage: int) -> list[Segment]:
        """The segments of one stage; empty when an earlier stage's overshoot swallowed it."""
        return [segment for segment in self.segments if segment.stage == stage]

    def stage_first_sample(self, stage: int) -> int | None:
        """Samples consumed before a stage begins; None for a stage without a step."""
        segments = self.stage_segments(stage)
        return segments[0].first_sample if segments else None

    def _learning_rate(self, segment: Segment, inside: int) -> float:
        segments = self.stage_segments(segment.stage)
        first, end = segments[0].first_sample, segments[-1].end_sample
        step_in_stage = segment.first_step - segment.stage_first_step + inside
        warmup_end = _sample_of_step(segments, self.stages[segment.stage].learning_rate.warmup_steps)
        # The last step of a stage is the one that arrives at `end`.
        last_step_sample = end - segments[-1].batch
        return learning_rate(
            self.stages[segment.stage].learning_rate,
            step_in_stage=step_in_stage,
            sample=segment.first_sample + inside * segment.batch - first,
            warmup_end=warmup_end - first,
            last=last_step_sample - first,
        )


def learning_rate(
    shape: LearningRate, *, step_in_stage: int, sample: int, warmup_end: int, last: int
) -> float:
    """The learning rate inside a stage.

    Args:
        shape: Warm-up and shape.
        step_in_stage: Steps of the stage already taken.
        sample: Samples of the stage already consumed.
        warmup_end: Samples of the stage consumed when warm-up is over.
        last: Samples of the stage consumed before its last step, where linear and cosine arrive at `end`.
    """
    if step_in_stage < shape.warmup_steps:
        done = (step_in_stage + 1) / shape.warmup_steps
        return shape.warmup_from + (shape.peak - shape.warmup_from) * done
    if shape.shape == "constant" or shape.end is None:
        return shape.peak
    progress = min(1.0, (sample - warmup_end) / max(1, last - warmup_end))
    if shape.shape == "linear":
        return shape.peak + (shape.end - shape.peak) * progress
    return shape.end + (shape.peak - shape.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _sample_of_step(segments: list[Segment], steps: int) -> int:
    """Samples consumed in the run when a stage has taken `steps` steps."""
    for segment in segments:
        if steps <= segment.steps:
            return segment.first_sample + steps * segment.batch
        steps -= segment.steps
    return segments[-1].end_sample
