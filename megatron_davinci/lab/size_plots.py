"""The pictures of a ladder: each arm's loss with its law, and each arm's difference from the control, over sizes."""

from __future__ import annotations

import numpy as np

from megatron_davinci.lab.over_sizes import AHEAD, OverSizes
from megatron_davinci.lab.verdict import Verdict
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.colors import assign
from megatron_davinci.report.plots import LinePlot, Series

_POINTS = 80


def law_plot(found: OverSizes, metric: str) -> LinePlot | None:
    """Losses over sizes, the laws through them with their intervals, to ten times the largest size."""
    fitted = [one for one in found.laws if one.law is not None]
    if not fitted:
        return None
    colours, series = assign(one.arm for one in found.laws), []
    for one in fitted:
        assert one.law is not None
        x = np.geomspace(min(one.sizes), AHEAD * max(one.sizes), _POINTS)
        tokens = one.tokens if one.law.of_data else None
        ahead = [one.law.predict(float(size), tokens) for size in x]
        series.append(
            Series(
                name=one.arm,
                x=x,
                y=[each.value for each in ahead],
                band=[max(each.high - each.value, each.value - each.low) for each in ahead],
                colour=colours[one.arm],
            )
        )
        if not one.law.of_data:
            sizes = sorted(set(one.sizes))
            means = [np.mean([y for n, y in zip(one.sizes, one.losses) if n == size]) for size in sizes]
            series.append(Series(name="", x=sizes, y=means, colour=colours[one.arm]))
    return LinePlot(
        title=f"{metric} over sizes, and its law",
        x=Axis("size", found.scale, log=True),
        y=Axis(metric, "nats per token"),
        series=series,
    )


def trend_plot(verdict: Verdict) -> LinePlot | None:
    """Differences from the control over sizes, with their intervals."""
    found = verdict.over_sizes
    if found is None or not found.trends:
        return None
    colours = assign(found.trends)
    series: list[Series] = []
    for arm in found.trends:
        points = sorted(
            (
                (found.sizes[one.size], one.found)
                for one in verdict.deciding
                if one.arm == arm and one.found is not None
            ),
            key=lambda point: point[0],
        )
        series.append(
            Series(
                name=arm,
                x=[size for size, _ in points],
                y=[pair.mean for _, pair in points],
                band=[pair.high - pair.mean if pair.pairs > 1 else 0.0 for _, pair in points],
                level=None if series else 0.0,
                colour=colours[arm],
            )
        )
    return LinePlot(
        title=f"{verdict.design.metrics[0].name} over sizes, less that of {verdict.control}",
        x=Axis("size", found.scale, log=True),
        y=Axis("difference", "nats per token"),
        series=series,
    )
