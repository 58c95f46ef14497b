"""Where a step's time goes: its phases over the tokens that a run consumed, and what each takes."""

from __future__ import annotations

import numpy as np

from megatron_davinci.report.axes import Axis
from megatron_davinci.report.numbers import duration
from megatron_davinci.report.plots import Bar, Bars, StackedArea
from megatron_davinci.report.run_plots import TOKENS
from megatron_davinci.report.run_story import RunStory

PHASES_CAPTION = (
    "The share of each phase in the steps of rank 0. What ranks wait for each other is in pipeline, gradient "
    "sync and parameter gather."
)
_BETWEEN = ("evaluation", "checkpoint")
# No two that lie beside each other look alike.
_COLOURS = {
    "data": "sand",
    "forward": "blue",
    "backward": "vermillion",
    "pipeline": "wine",
    "gradient_sync": "violet",
    "optimizer": "green",
    "parameter_gather": "sand",
    "other": "slate",
}
_BINS = 60
_SEEN = 0.002  # of the whole: less is no wider than a hairline


def phases_plot(story: RunStory) -> StackedArea | None:
    """The share of each phase in the steps over the run; None where no phases were timed."""
    phases = {name: seconds for name, seconds in story.metrics.phases.items() if name not in _BETWEEN}
    whole = sum(float(seconds.sum()) for seconds in phases.values())
    if not whole or len(story.metrics) < 2:
        return None
    count = len(story.metrics)
    bounds = np.unique(np.linspace(0, count, min(_BINS, count) + 1).round().astype(np.int64))
    sums = {name: np.add.reduceat(seconds, bounds[:-1]) for name, seconds in phases.items()}
    total = np.maximum(np.sum(list(sums.values()), axis=0), 1e-12)
    ends = np.r_[0.0, story.tokens]
    return StackedArea(
        title="Time by phase",
        x=TOKENS,
        edges=ends[bounds],
        bands=[
            (_written(name), _colour(name), seconds / total)
            for name, seconds in sums.items()
            if phases[name].sum() >= _SEEN * whole
        ],
        stages=story.stage_ranges,
    )


def phase_seconds_plot(story: RunStory) -> Bars | None:
    """Seconds of a step by phase, the mean over the run, with the ranks that it took least and most."""
    slowest = story.metrics.slowest
    means = {
        name: float(seconds.mean())
        for name, seconds in story.metrics.phases.items()
        if name not in _BETWEEN and len(seconds)
    }
    whole = sum(means.values())
    shown = {name: seconds for name, seconds in means.items() if seconds >= _SEEN * whole > 0}
    if not shown:
        return None
    return Bars(
        title="A step by phase",
        value=Axis("time of a step", "s"),
        bars=[
            Bar(_written(name), seconds, _colour(name), *slowest.get(name, (None, None)))
            for name, seconds in shown.items()
        ],
        note="bar: rank 0; line: least to most of all ranks" if slowest else "",
        write=duration,
    )


def seconds_caption(story: RunStory) -> str:
    """What evaluation and saving took, which are in no step."""
    phases = story.metrics.phases
    parts = [
        f"{_written(name)} {duration(float(phases[name].sum()))}"
        for name in _BETWEEN
        if name in phases and phases[name].any()
    ]
    return "The mean over the run." + (f" Between steps: {', '.join(parts)} in all." if parts else "")


def _written(name: str) -> str:
    return name.replace("_", " ")


def _colour(name: str) -> str:
    return _COLOURS.get(name, "slate")
