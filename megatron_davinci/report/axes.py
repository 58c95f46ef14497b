"""One plot's axes: ranges, ticks, the head with its stages, the names at the line ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.report import canvas
from megatron_davinci.report.canvas import LINE_HEIGHT, Box
from megatron_davinci.report.numbers import number, quantity, scientific, tick_labels

_STAGE_ROWS = 4  # of names above the axes: the plot needs its height


@dataclass(frozen=True)
class Stage:
    """A named range of the x axis, in its unit."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Axis:
    """What an axis measures, its unit, and how it is scaled.

    Args:
        label: What is measured ("training loss").
        unit: Its unit ("nats per token"); a count of things has the things ("tokens").
        log: Logarithmic.
        zero: The range includes zero.
    """

    label: str
    unit: str
    log: bool = False
    zero: bool = False

    @property
    def caption(self) -> str:
        """Label and unit: "training loss, nats per token"."""
        # As a word of it: "s" is in "time of a step" as a letter only.
        said = f" {self.unit} " in f" {self.label} "
        return f"{self.label}, {self.unit}" if self.unit and not said else self.label

    def write(self, value: float) -> str:
        """A value of this axis, in text."""
        if not math.isfinite(value) or (value and abs(value) < 1e-3):
            return scientific(value, 3)
        return quantity(value) if abs(value) >= 10_000 else number(value)

    def range(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """The limits that hold every finite value (every positive one on a log axis), with a little room on y."""
        usable = values[np.isfinite(values) & ((values > 0) | (not self.log))]
        if not len(usable):
            return (0.1, 1.0) if self.log else (0.0, 1.0)
        low, high = float(usable.min()), float(usable.max())
        if self.zero and not self.log:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            if self.log:
                return low / 2, high * 2
            room = abs(low) / 2 or 1.0
            return (low - room, high + room) if not self.zero else (0.0, room)
        return low, high


def padded(axis: Axis, limits: tuple[float, float]) -> tuple[float, float]:
    """Limits with 6% of room above and below; a side that is zero by `axis.zero` stays at zero."""
    low, high = limits
    if axis.log:
        factor = (high / low) ** 0.06
        return low / factor, high * factor
    room = 0.06 * (high - low)
    return (low if axis.zero and low == 0 else low - room), (high if axis.zero and high == 0 else high + room)


def ticks(axis: Axis, limits: tuple[float, float], most: int) -> list[float]:
    """At most about `most` round positions within the limits: multiples of 1, 2, 2.5, 5; on a log axis 1-2-5."""
    from matplotlib.ticker import MaxNLocator

    low, high = limits
    if axis.log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            marks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
            if len(marks) <= most:
                break
        else:
            marks = marks[:: -(-len(marks) // most)]
        if len(marks) >= 2:
            return marks
    found = MaxNLocator(nbins=max(1, most), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(value) for value in found if low - slack <= value <= high + slack]


class Frame:
    """The axes of a plot with everything around them; draw on `axes` between `head` and `finish`.

    Args:
        drawn: The figure.
        box: The plot's part of it.
        x: The x axis, its caption below.
        y: The y axis, its caption above on the left, to be read without turning one's head.
        x_range: The limits of x.
        y_range: The limits of y before padding.
        names: What will stand at the right, which decides how much room is left there.
    """

    def __init__(
        self,
        drawn: Any,
        box: Box,
        *,
        x: Axis,
        y: Axis,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        names: Sequence[str],
    ) -> None:
        self.drawn, self.box, self.x, self.y = drawn, box, x, y
        self.axes = drawn.add_axes((0, 0, 1, 1), facecolor="none")
        self.x_range, self.y_range = x_range, padded(y, y_range) if y.unit != "%" else y_range
        self.names = {name: canvas.shorten(drawn, name, 0.3 * box.width, bold=True) for name in names}
        self.x_ticks: list[float] = []
        self.inner = box

    def head(self, title: str, note: str, stages: Sequence[Stage]) -> None:
        """Measure the margins, place the axes, and write the title, the y caption, the note and the stages."""
        drawn, box = self.drawn, self.box
        height_left = box.height - (90 if title else 70)
        y_ticks = ticks(self.y, self.y_range, max(3, int(height_left / 26)))
        left = max((canvas.text_width(drawn, text) for text in tick_labels(y_ticks)), default=0.0) + 7
        names = max((canvas.text_width(drawn, name, bold=True) for name in self.names.values()), default=0.0)
        right = names + 20 if names else 14.0
        width = box.width - left - right
        self.x_ticks = ticks(self.x, self.x_range, max(4, int(width / 54)))
        low, high = self.x_range
        # Elsewhere a run goes on beyond what a plot shows of it.
        stages = [stage for stage in stages if stage.end > low and stage.start < high]
        rows = self._stage_rows(stages, box.left + left, width)
        deepest = 1 + max((row for _, _, row in rows), default=-1)
        top = LINE_HEIGHT + (20 if title else 0) + deepest * LINE_HEIGHT + 4
        self.inner = Box(box.left + left, box.bottom + 34, width, box.height - 34 - top)
        self._scale(y_ticks)
        y = box.top
        if title:
            canvas.write(
                drawn,
                box.left,
                y - 8,
                canvas.shorten(drawn, title, box.width / 1.25, bold=True),
                slot="ink",
                bold=True,
                size=canvas.TITLE_SIZE,
            )
            y -= 20
        canvas.write(drawn, box.left, y - 6, self.y.caption)
        if note:
            room = box.width - canvas.text_width(drawn, self.y.caption) - 14
            canvas.write(drawn, box.right, y - 6, canvas.shorten(drawn, note, room), align="right")
        self._stages(stages, rows)

    def finish(self, ends: Sequence[tuple[str, str, float, float]], *, empty: bool = False) -> None:
        """Label the ends, `(name, colour, x, y)` in the axes' units; say so where there is nothing to draw."""
        self.axes.set_xlim(*self.x_range)
        self.axes.set_ylim(*self.y_range)
        inner = self.inner
        if empty:
            canvas.write(
                self.drawn,
                inner.left + inner.width / 2,
                inner.bottom + inner.height / 2,
                "no data yet",
                align="center",
            )
        labels = []
        for name, slot, x, y in ends:
            px, py = self._at(x, y)
            labels.append((self.names.get(name, name), slot, px, min(max(py, inner.bottom), inner.top)))
        canvas.end_labels(self.drawn, inner, labels)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        """A point of the axes as a point of the figure."""
        inner = self.inner
        return (
            inner.left + inner.width * _fraction(x, self.x_range, log=self.x.log),
            inner.bottom + inner.height * _fraction(y, self.y_range, log=self.y.log),
        )

    def _scale(self, y_ticks: list[float]) -> None:
        """Scales, ticks, a light grid for y, and the one spine that is left."""
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        axes = self.axes
        canvas.set_axes(self.drawn, axes, self.inner)
        axes.set_xscale("log" if self.x.log else "linear")
        axes.set_yscale("log" if self.y.log else "linear")
        for axis, places in ((axes.xaxis, self.x_ticks), (axes.yaxis, y_ticks)):
            axis.set_major_locator(FixedLocator(places))
            axis.set_major_formatter(FixedFormatter(tick_labels(places)))
            axis.set_minor_locator(NullLocator())
        axes.tick_params(axis="both", length=0, pad=5, labelcolor=canvas.colour("muted"))
        axes.tick_params(axis="x", length=3, color=canvas.colour("muted"))
        axes.grid(axis="y", color=canvas.colour("rule"), linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(canvas.colour("muted"))
        axes.spines["bottom"].set_linewidth(0.8)
        canvas.write(
            self.drawn,
            self.inner.left + self.inner.width / 2,
            self.box.bottom + 7,
            self.x.caption,
            align="center",
        )

    def _stage_rows(
        self, stages: Sequence[Stage], left: float, width: float
    ) -> list[tuple[Stage, float, int]]:
        """Where each stage's name goes: the middle of its range and the first row it does not touch another in.

        The row is -1 where all of `_STAGE_ROWS` are taken: of many short stages in one place, some have no name.
        """
        placed: list[tuple[Stage, float, int]] = []
        filled: list[float] = []
        for stage in stages:
            start, end = (
                min(max(_fraction(edge, self.x_range, log=self.x.log), 0.0), 1.0)
                for edge in (stage.start, stage.end)
            )
            half = canvas.text_width(self.drawn, stage.name) / 2
            middle = min(max(left + width * (start + end) / 2, left + half), left + width - half)
            row = next((row for row, until in enumerate(filled) if middle - half >= until), len(filled))
            if row < _STAGE_ROWS:
                filled[row : row + 1] = [middle + half + 6]
            placed.append((stage, middle, row if row < _STAGE_ROWS else -1))
        return placed

    def _stages(self, stages: Sequence[Stage], rows: Sequence[tuple[Stage, float, int]]) -> None:
        inner = self.inner
        for stage, middle, row in rows:
            height = inner.top + 8 + row * LINE_HEIGHT
            if row >= 0:
                canvas.write(self.drawn, middle, height, stage.name, slot="ink", align="center")
            x, _ = self._at(stage.start, self.y_range[0])
            if stage is not stages[0] and inner.left < x < inner.right:
                canvas.rule(self.drawn, [(x, inner.bottom), (x, inner.top + 3)], slot="muted", alpha=0.7)


def _fraction(value: float, limits: tuple[float, float], *, log: bool) -> float:
    """Where a value lies between two limits, 0 to 1 (and beyond)."""
    low, high = limits
    if log:
        if value <= 0:
            return -math.inf
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def draw_bars(
    drawn: Any,
    box: Box,
    *,
    title: str,
    note: str,
    axis: Axis,
    write: Callable[[float], str],
    bars: Sequence[tuple[str, float, str, float | None, float | None, float | None]],
) -> None:
    """Horizontal bars: names at the left, values at the right of everything that is drawn on their row.

    Args:
        drawn: The figure.
        box: The plot's part of it.
        title: Written on top where it is not empty.
        note: A few words at the top right.
        axis: What the bars measure.
        write: How a value is written.
        bars: `(name, value, colour, low, high, reference)`, top down.
    """
    from matplotlib.patches import Rectangle

    y = box.top
    if title:
        title = canvas.shorten(drawn, title, box.width / 1.25, bold=True)
        canvas.write(drawn, box.left, y - 8, title, slot="ink", bold=True, size=canvas.TITLE_SIZE)
        y -= 20
    canvas.write(drawn, box.left, y - 6, axis.caption)
    if note:
        canvas.write(drawn, box.right, y - 6, note, align="right")
    y -= LINE_HEIGHT + 8
    names = {bar[0]: canvas.shorten(drawn, bar[0], 0.35 * box.width) for bar in bars}
    left = box.left + max((canvas.text_width(drawn, name) for name in names.values()), default=0.0) + 10
    texts = [write(bar[1]) for bar in bars]
    right = box.right - max((canvas.text_width(drawn, text, bold=True) for text in texts), default=0.0) - 10
    marks = [v for bar in bars for v in (bar[1], *bar[3:]) if v is not None and math.isfinite(v)]
    low, high = min([0.0, *marks]), max([0.0, *marks])
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return left + (right - left) * (value - low) / span

    if not bars:
        canvas.write(drawn, box.left + box.width / 2, (y + box.bottom) / 2, "no data yet", align="center")
        return
    step = min(34.0, (y - box.bottom - 6) / len(bars))
    thick = min(15.0, step * 0.6)
    for index, ((name, value, slot, start, end, reference), text) in enumerate(zip(bars, texts)):
        middle = y - (index + 0.5) * step
        canvas.write(
            drawn, left - 8, middle, names[name], slot="ink", align="right", vertical="center_baseline"
        )
        if not math.isfinite(value):
            continue
        a, b = sorted((at(0.0), at(value)))
        drawn.add_artist(
            Rectangle(
                (a / 72, (middle - thick / 2) / 72),
                (b - a) / 72,
                thick / 72,
                transform=drawn.dpi_scale_trans,
                facecolor=canvas.colour(slot),
                alpha=0.85,
                linewidth=0,
            )
        )
        text_from = max(b, at(0.0)) + 6
        if start is not None and end is not None:
            canvas.rule(drawn, [(at(start), middle), (at(end), middle)], slot="ink", width=1.4)
            for edge in (start, end):
                canvas.rule(drawn, [(at(edge), middle - 3), (at(edge), middle + 3)], slot="ink", width=1.4)
            text_from = max(text_from, at(end) + 6)
        if reference is not None:
            x = at(reference)
            canvas.rule(
                drawn, [(x, middle - thick / 2 - 3), (x, middle + thick / 2 + 3)], slot="ink", width=1.6
            )
            # The value belongs to the bar: it goes beyond the mark only where it would run into it.
            if text_from - 6 <= x <= text_from + canvas.text_width(drawn, text, bold=True) + 4:
                text_from = x + 6
        canvas.write(drawn, text_from, middle, text, slot="ink", bold=True, vertical="center_baseline")
    zero = at(0.0)
    canvas.rule(drawn, [(zero, y), (zero, y - len(bars) * step)], slot="muted")
