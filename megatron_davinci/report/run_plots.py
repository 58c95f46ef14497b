"""The plots of one run, all over the tokens that it consumed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.report.axes import Axis
from megatron_davinci.report.colors import assign
from megatron_davinci.report.curves import smooth
from megatron_davinci.report.numbers import quantity
from megatron_davinci.report.plots import Bar, Bars, LinePlot, Plot, Series, StackedArea
from megatron_davinci.report.run_story import RunStory

TOKENS = Axis("tokens consumed", "tokens", zero=True)
# Below this many steps, the raw curve is all there is to see.
SMOOTH_FROM = 100


def heldout_plot(story: RunStory) -> LinePlot | None:
    """Held-out loss by domain, the bigram model's as a dashed line; None where there are no evaluations."""
    evaluations = story.files.evaluations
    series = []
    for domain in story.domains:
        points = [
            (e.consumed_tokens, e.heldout_loss[domain]) for e in evaluations if domain in e.heldout_loss
        ]
        if points:
            x, y = zip(*points)
            level = story.bigram_loss.get(domain)
            series.append(Series(name=domain, x=x, y=y, colour=story.colours[domain], level=level))
    if not series:
        return None
    few = max(len(np.asarray(one.x)) for one in series) < 10
    return LinePlot(
        title="Held-out loss",
        x=TOKENS,
        y=Axis("held-out loss", "nats per token"),
        series=series,
        stages=story.stage_ranges,
        skip_start=0.0 if few else 0.04,
        note="dashed: bigram model" if any(one.level is not None for one in series) else "",
    )


def loss_plot(story: RunStory) -> LinePlot | None:
    """Training loss, raw and smoothed within each stage; None before the first step."""
    return _metric(story, "loss", "Training loss", Axis("training loss", "nats per token"), skip_start=0.02)


def domain_loss_plot(story: RunStory) -> LinePlot | None:
    """Training loss by domain, a mean over several steps of one stage; None where steps do not say it.

    A step has few samples of a domain, so what is drawn is the sum of their losses over the sum of their weights in a
    window, and nothing where the window has none.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    for source, found in story.metrics.source_loss.items():
        domain = story.files.domains.get(source, source)
        loss, weight = found.T
        sums[domain] = sums.get(domain, 0.0) + np.stack([loss * weight, weight])
    colours = story.colours | {
        name: colour for name, colour in assign([*story.domains, *sums]).items() if name not in story.colours
    }
    series = []
    for domain in sorted(sums, key=lambda name: (name not in story.domains, name)):
        nats, weights = (_smooth_by_stage(story, column) for column in sums[domain])
        mean = np.full(len(nats), np.nan)
        np.divide(nats, weights, out=mean, where=weights > 0)
        series.append(Series(name=domain, x=story.tokens, y=mean, colour=colours[domain]))
    if not series:
        return None
    return LinePlot(
        title="Training loss by domain",
        x=TOKENS,
        y=Axis("training loss", "nats per token"),
        series=series,
        stages=story.stage_ranges,
        skip_start=0.04,
    )


def mixture_plot(story: RunStory) -> StackedArea | None:
    """The share of each domain over the run; None where the journal says nothing about what was consumed."""
    mixture = story.mixture
    if not len(mixture.edges):
        return None
    return StackedArea(
        title="Mixture",
        x=TOKENS,
        edges=mixture.edges,
        bands=[(name, story.colours[name], shares) for name, shares in mixture.shares.items()],
        stages=story.stage_ranges,
    )


def learning_rate_plot(story: RunStory, *, half: bool = True) -> LinePlot | None:
    """The learning rate of each step; None where none was recorded."""
    axis = Axis("learning rate", "dimensionless", zero=True)
    return _metric(story, "learning_rate", "Learning rate", axis, half=half, steps=True)


def batch_size_plot(story: RunStory) -> LinePlot | None:
    """The sequences in each step; None where none were recorded."""
    axis = Axis("global batch size", "sequences", zero=True)
    return _metric(story, "global_batch_size", "Batch size", axis, half=True, steps=True)


def throughput_plot(story: RunStory) -> LinePlot | None:
    """Tokens per second of each step; None where none were recorded."""
    axis = Axis("throughput", "tokens per second", zero=True)
    return _metric(story, "tokens_per_second", "Throughput", axis, half=True)


def grad_norm_plot(story: RunStory) -> LinePlot | None:
    """The gradient norm of each step, on a log axis; None where none was recorded."""
    axis = Axis("gradient norm (L2, before clipping)", "log scale", log=True)
    return _metric(story, "grad_norm", "Gradient norm", axis, half=True)


def final_loss_plot(story: RunStory) -> Bars | None:
    """Held-out loss at the end by domain, with the bigram model's; None where there is none."""
    bars = [
        Bar(domain, story.final_loss[domain], story.colours[domain], reference=story.bigram_loss.get(domain))
        for domain in story.domains
        if domain in story.final_loss
    ]
    if not bars:
        return None
    compared = any(bar.reference is not None for bar in bars)
    return Bars(
        title="Held-out loss at the end",
        half=True,
        value=Axis("held-out loss", "nats per token"),
        bars=bars,
        note="mark: bigram model" if compared else "",
        write=lambda value: f"{value:.3f}",
    )


def domain_tokens_plot(story: RunStory) -> Bars | None:
    """How many tokens of each domain the run has drawn; None where the journal does not say."""
    mixture = story.mixture
    if not len(mixture.edges):
        return None
    widths = np.diff(mixture.edges)
    return Bars(
        title="Tokens by domain",
        half=True,
        value=Axis("tokens drawn", "tokens"),
        bars=[
            Bar(name, float(shares @ widths), story.colours[name]) for name, shares in mixture.shares.items()
        ],
        write=quantity,
    )


def smoothing_window(steps: int) -> int:
    """Over how many steps the drawn mean goes: a hundredth of the run, an odd number."""
    return max(5, steps // 100) | 1


def _metric(
    story: RunStory,
    column: str,
    title: str,
    axis: Axis,
    *,
    half: bool = False,
    steps: bool = False,
    skip_start: float = 0.0,
) -> LinePlot | None:
    values = story.metrics[column]
    if not np.isfinite(values).any():
        return None
    smoothed = not steps and len(values) >= SMOOTH_FROM
    x, y = story.tokens, values
    if steps:
        # A schedule's value holds from where its step begins, which is where the step before it ended.
        x, y = np.r_[0.0, x], np.r_[y, y[-1]]
    elif smoothed:
        y = _smooth_by_stage(story, values)
    series = Series(name="", x=x, y=y, colour="blue", faint=values if smoothed else None)
    return LinePlot(
        title=title,
        half=half,
        x=TOKENS,
        y=axis,
        series=[series],
        stages=story.stage_ranges,
        steps=steps,
        skip_start=skip_start if smoothed else 0.0,
    )


def _smooth_by_stage(story: RunStory, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A mean that does not reach over a stage boundary, where a curve may really jump."""
    window = smoothing_window(len(values))
    parts = [smooth(values[stage.first : stage.last + 1], window) for stage in story.stages]
    return np.concatenate(parts) if parts else values


def overview_plots(story: RunStory) -> list[Plot]:
    """What one looks at first: held-out loss, training loss, mixture, learning rate; those that there are."""
    found = (
        heldout_plot(story),
        loss_plot(story),
        mixture_plot(story),
        learning_rate_plot(story, half=False),
    )
    return [plot for plot in found if plot is not None]
