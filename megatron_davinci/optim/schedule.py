"""Stage, batch size and learning rate as pure functions of `consumed_samples`, the run's only clock."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_davinci.config.curriculum import BatchPhase, Stage
from megatron_davinci.optim.learning_rate import RateSpan


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
            for batch, steps in _phases(stage.global_batch_size, sample, target_samples, sequence_length):
                self.segments.append(Segment(index, sample, step, steps, batch, stage_first_step))
                sample += steps * batch
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
            learning_rate=self._rates[segment.stage].at(
                step=segment.first_step - segment.stage_first_step + inside,
                sample=consumed_samples,
                batch=segment.batch,
            ),
            ends_stage=last and inside + 1 == segment.steps,
        )

    def stage_segments(self, stage: int) -> list[Segment]:
        """The segments of one stage; empty when an earlier stage's overshoot swallowed it."""
        return [segment for segment in self.segments if segment.stage == stage]

    def stage_first_sample(self, stage: int) -> int | None:
        """Samples consumed before a stage begins; None for a stage without a step."""
        segments = self.stage_segments(stage)
        return segments[0].first_sample if segments else None

    def cut_rates(self) -> list[str]:
        """The stages that are too short for the warm-up or the decay that they are given, a line each."""
        found = []
        for index, stage in enumerate(self.stages):
            segments, rate = self.stage_segments(index), stage.learning_rate
            if not segments:
                continue
            steps, last = sum(segment.steps for segment in segments), segments[-1]
            reached = self.at(last.end_sample - last.batch).learning_rate
            warm, decay, said = rate.warmup_steps, rate.decay_steps or 0, ""
            if last.end_sample <= self._rates[index].warm and reached != rate.peak:
                said = (
                    f"its warm-up is longer than its {steps:,} steps: the learning rate ends at {reached:.2e} and "
                    f"never comes to the peak, {rate.peak:.2e}"
                )
            elif rate.end is not None and reached != rate.end:
                said = f"no step is left for the learning rate to fall to its end, {rate.end:.2e}"
            elif decay and warm + decay > steps:
                said = f"of its {steps:,} steps {steps - warm:,} are left for a decay of {decay:,}"
            if said:
                found.append(f"stage {stage.name}: {said}")
        return found

    @cached_property
    def _rates(self) -> dict[int, RateSpan]:
        """The learning rate of each stage that has a step."""
        spans = {}
        for index, stage in enumerate(self.stages):
            segments = self.stage_segments(index)
            if not segments:
                continue
            rate, length = stage.learning_rate, self.sequence_length
            first, steps = segments[0].first_sample, sum(segment.steps for segment in segments)
            # The last step of a stage is the one that arrives at `end`.
            last = segments[-1].end_sample - segments[-1].batch
            if rate.warmup_tokens is not None:
                warm = _boundary_at_or_after(segments, first + -(-rate.warmup_tokens // length))
            else:
                warm = _sample_of_step(segments, rate.warmup_steps)
            decay = first
            if rate.decay_steps is not None:
                decay = _sample_of_step(segments, max(0, steps - 1 - rate.decay_steps))
            elif rate.decay_tokens is not None:
                decay = last - -(-rate.decay_tokens // length)
            spans[index] = RateSpan(rate, length, first, warm, max(decay, warm), last)
        return spans


def _phases(
    phases: Sequence[BatchPhase], sample: int, target: int, sequence_length: int
) -> Iterator[tuple[int, int]]:
    """Batch size and steps of each phase of a stage that takes a step.

    Args:
        phases: The stage's.
        sample: Samples consumed before the stage.
        target: Samples that are consumed when the stage has enough.
        sequence_length: Tokens a sample.
    """
    # Where the phase before was to end, in tokens: its overshoot is not added to the next.
    due = sample * sequence_length
    for phase in phases:
        steps = needed = max(0, -(-(target - sample) // phase.size))
        if phase.steps is not None:
            steps = min(phase.steps, needed)
            due = (sample + phase.steps * phase.size) * sequence_length
        elif phase.lengths:
            due += phase.tokens if phase.tokens is not None else (phase.samples or 0) * sequence_length
            steps = min(needed, max(0, -(-(-(-due // sequence_length) - sample) // phase.size)))
        if steps:
            yield phase.size, steps
            sample += steps * phase.size


def _sample_of_step(segments: list[Segment], steps: int) -> int:
    """Samples consumed in the run when a stage has taken `steps` steps."""
    for segment in segments:
        if steps <= segment.steps:
            return segment.first_sample + steps * segment.batch
        steps -= segment.steps
    return segments[-1].end_sample


def _boundary_at_or_after(segments: list[Segment], sample: int) -> int:
    """Where the first step of a stage begins that has at least `sample` samples of the run before it."""
    for segment in segments:
        if sample <= segment.end_sample:
            return (
                segment.first_sample
                + max(0, -(-(sample - segment.first_sample) // segment.batch)) * segment.batch
            )
    return segments[-1].end_sample
