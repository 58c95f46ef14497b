"""A schedule as curves to draw: few enough points for any length of run, and every corner among them."""

from __future__ import annotations

from megatron_davinci.config import RunConfig
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.report.schedule import Curves
from megatron_davinci.train.plan import RunPlan

_POINTS = 400  # steps of one batch size in one stage that are drawn, besides the first and the last
_CLOSE = 60  # steps at its beginning and end, where warm-up and decay have their corners


def schedule_curves(config: RunConfig, plan: RunPlan) -> Curves:
    """What is drawn of a plan."""
    schedule, length = Schedule(config.curriculum, config.data.sequence_length), config.data.sequence_length
    tokens: list[float] = []
    rates: list[float] = []
    batches: list[float] = []
    for segment in schedule.segments:
        warm = config.curriculum[segment.stage].learning_rate.warmup_steps
        for inside in _drawn_steps(segment.steps, warm):
            step = schedule.at(segment.first_sample + inside * segment.batch)
            tokens.append(step.first_sample * length)
            rates.append(step.learning_rate)
            batches.append(step.batch)
    # The last value holds to the end of its step.
    tokens.append(schedule.total_samples * length)
    rates.append(rates[-1])
    batches.append(batches[-1])
    stages = [stage for stage in plan.stages if stage.steps]
    domains = sorted({domain for stage in stages for domain in stage.domain_tokens}, key=_order)
    return Curves(
        tokens=tokens,
        learning_rate=rates,
        batch=batches,
        edges=[*(stage.first_sample * length for stage in stages), schedule.total_samples * length],
        stages=[stage.name for stage in stages],
        shares={
            domain: [stage.domain_tokens.get(domain, 0) / stage.tokens for stage in stages]
            for domain in domains
        },
    )


def _drawn_steps(steps: int, warmup: int) -> list[int]:
    """Numbers of steps: evenly spread, and close together where a warm-up ends or a stage does."""
    found = {0, steps - 1, *(round(i * (steps - 1) / _POINTS) for i in range(_POINTS + 1))}
    found |= set(range(min(_CLOSE, steps))) | set(range(max(0, steps - _CLOSE), steps))
    if warmup:
        found |= {round(i * warmup / _CLOSE) for i in range(_CLOSE + 1)}
    return sorted(step for step in found if 0 <= step < steps)


def _order(domain: str) -> tuple[int, str]:
    known = ("general", "code", "science", "qa")
    return (known.index(domain) if domain in known else len(known), domain)
