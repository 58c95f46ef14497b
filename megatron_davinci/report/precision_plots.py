"""What products of few bits lost over a run, and where it was most in the last step that was watched."""

from __future__ import annotations

import numpy as np

from megatron_davinci.report.axes import Axis
from megatron_davinci.report.numbers import percent, scientific
from megatron_davinci.report.plots import LinePlot, Series
from megatron_davinci.report.run_plots import TOKENS
from megatron_davinci.report.run_story import RunStory

_COLOURS = {"input": "blue", "weight": "green", "gradient": "vermillion"}
_ROWS = 12

CAPTION = "The linear layer of which most is lost, among those of the model, in each step that was watched."


def lost_plot(story: RunStory, figure: str) -> LinePlot | None:
    """The largest part of an operand that any linear layer lost, by operand; None where nothing was watched.

    Args:
        story: The run.
        figure: `underflow` or `overflow`.
    """
    watched = story.metrics.low_precision
    rows = [row for row in sorted(watched) if row < len(story.tokens)]
    series = []
    for operand, colour in _COLOURS.items():
        points = [
            (
                story.tokens[row],
                max(
                    (one[operand][figure] for one in watched[row].values() if operand in one), default=np.nan
                ),
            )
            for row in rows
        ]
        if np.isfinite([y for _, y in points]).any():
            x, y = zip(*points, strict=True)
            series.append(Series(name=operand, x=x, y=y, colour=colour))
    if not series:
        return None
    words = {"underflow": "became zero", "overflow": "was clipped"}[figure]
    return LinePlot(
        title=f"Part that {words}",
        half=True,
        x=TOKENS,
        y=Axis(f"part of an operand that {words}", "largest of all layers", zero=True),
        series=series,
        stages=story.stage_ranges,
    )


def now_and_then_plot(story: RunStory, column: str) -> LinePlot | None:
    """What some steps say only; None where none does.

    Args:
        story: The run.
        column: `logit_sharpness` or `reference_gap`.
    """
    values = story.metrics[column]
    there = np.flatnonzero(np.isfinite(values))
    there = there[there < len(story.tokens)]
    if not len(there):
        return None
    title, axis = {
        "logit_sharpness": ("Sharpness of the logits", Axis("sharpness", "at the last token")),
        "reference_gap": (
            "Loss over the reference's, less 1",
            Axis("difference", "mean over the band's steps"),
        ),
    }[column]
    return LinePlot(
        title=title,
        half=True,
        x=TOKENS,
        y=axis,
        series=[Series(name="", x=story.tokens[there], y=values[there], colour="blue")],
        stages=story.stage_ranges,
    )


def lost_table(story: RunStory) -> tuple[list[str], list[list[str]]]:
    """The operands of which most was lost in the last step that was watched; no rows where none was."""
    watched = story.metrics.low_precision
    found = [
        (one["underflow"] + one["overflow"], name, operand, one)
        for name, operands in (watched[max(watched)] if watched else {}).items()
        for operand, one in operands.items()
    ]
    found.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    rows = [
        [
            name,
            operand,
            scientific(one["amax"]),
            scientific(one["scale"]),
            percent(one["underflow"], 2),
            percent(one["overflow"], 2),
        ]
        for _, name, operand, one in found[:_ROWS]
    ]
    return ["Linear layer", "Operand", "Largest", "Scale", "Became zero", "Clipped"], rows
