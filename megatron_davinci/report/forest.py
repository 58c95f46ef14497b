"""A forest plot: the difference of each arm to one of them, with its interval and each seed as a dot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_davinci.report import canvas
from megatron_davinci.report.axes import Axis, ticks
from megatron_davinci.report.canvas import LINE_HEIGHT, Box
from megatron_davinci.report.numbers import NOTHING, tick_labels
from megatron_davinci.report.plots import Plot, Table


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        name: Its name.
        value: The mean difference.
        low: Lower end of its interval; None for none.
        high: Upper end.
        dots: One for each seed.
        colour: A key of `report.colors.SERIES`.
        words: What it is, in grey below the name.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    dots: Sequence[float]
    colour: str
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Forest(Plot):
    """Differences to a reference at zero; less is better.

    Attributes:
        axis: What the differences are of.
        rows: From the top down.
        write: How a value is written at its row's end.
        better: Written on the side where it is better, and `worse` on the other.
        limits: The range of the axis; what lies outside is drawn as an arrow at the edge. None holds everything.
    """

    axis: Axis
    rows: Sequence[Row]
    write: Callable[[float], str]
    better: str = "better"
    worse: str = "worse"
    limits: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[float, float]:
        """As high as its rows need."""
        return super().size[0], 62.0 + self._step * len(self.rows)

    @property
    def _step(self) -> float:
        return 31.0 if any(row.words for row in self.rows) else 21.0

    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """See `Plot.draw`."""
        top = box.top
        if titled:
            canvas.write(drawn, box.left, top - 8, self.title, slot="ink", bold=True, size=canvas.TITLE_SIZE)
            top -= 20
        words = [canvas.shorten(drawn, row.words, 0.36 * box.width) for row in self.rows]
        names = [canvas.shorten(drawn, row.name, 0.36 * box.width, bold=True) for row in self.rows]
        named = [
            max(canvas.text_width(drawn, name, bold=True), canvas.text_width(drawn, text))
            for name, text in zip(names, words)
        ]
        texts = [self.write(row.value) for row in self.rows]
        left = box.left + max(named, default=0.0) + 16
        right = (
            box.right - max((canvas.text_width(drawn, text, bold=True) for text in texts), default=0.0) - 12
        )
        marks = [0.0]
        for row in self.rows:
            marks += [
                v for v in (row.low, row.high, row.value, *row.dots) if v is not None and math.isfinite(v)
            ]
        low, high = min(marks), max(marks)
        room = 0.06 * ((high - low) or 1.0)
        low, high = self.limits or (low - room, high + room)

        def at(value: float) -> float:
            return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

        y, bottom = top - 2 * LINE_HEIGHT - 6, top - 2 * LINE_HEIGHT - 6 - self._step * len(self.rows)
        canvas.write(drawn, box.left, top - 6, self.axis.caption)
        if self.note:
            canvas.write(drawn, box.right, top - 6, self.note, align="right")
        self._sides(drawn, at, top - 6 - LINE_HEIGHT - 3, (left, right))
        places = ticks(self.axis, (low, high), max(3, int((right - left) / 70)))
        for value, text in zip(places, tick_labels(places)):
            canvas.rule(drawn, [(at(value), y), (at(value), bottom)], slot="rule")
            canvas.write(drawn, at(value), bottom - 8, text, align="center")
        canvas.rule(drawn, [(at(0.0), y), (at(0.0), bottom)], slot="ink", width=1.1)
        for index, (row, text) in enumerate(zip(self.rows, texts)):
            middle = y - (index + 0.5) * self._step
            lift = 6.5 if words[index] else 0.0
            canvas.write(
                drawn,
                box.left,
                middle + lift,
                names[index],
                slot=row.colour,
                bold=True,
                vertical="center_baseline",
            )
            if words[index]:
                canvas.write(drawn, box.left, middle - lift, words[index], vertical="center_baseline")
            self._row(drawn, at, middle, row, (low, high))
            canvas.write(
                drawn,
                box.right,
                middle,
                text,
                slot="ink",
                align="right",
                bold=True,
                vertical="center_baseline",
            )

    def _sides(self, drawn: Any, at: Callable[[float], float], y: float, edges: tuple[float, float]) -> None:
        for text, align, x, room in (
            (f"← {self.better}", "right", at(0.0) - 8, at(0.0) - 8 - edges[0]),
            (f"{self.worse} →", "left", at(0.0) + 8, edges[1] - at(0.0) - 8),
        ):
            if canvas.text_width(drawn, text) <= room:
                canvas.write(drawn, x, y, text, slot="ink", align=align)

    def _row(
        self,
        drawn: Any,
        at: Callable[[float], float],
        y: float,
        row: Row,
        limits: tuple[float, float],
    ) -> None:
        def inside(value: float) -> bool:
            return limits[0] <= value <= limits[1]

        if row.low is not None and row.high is not None:
            canvas.rule(drawn, [(at(row.low), y), (at(row.high), y)], slot=row.colour, width=2.0)
            for end in filter(inside, (row.low, row.high)):
                canvas.rule(drawn, [(at(end), y - 3.5), (at(end), y + 3.5)], slot=row.colour, width=2.0)
        for value in filter(inside, row.dots):
            _dot(drawn, at(value), y, row.colour, 2.1, alpha=0.55)
        if inside(row.value):
            _dot(drawn, at(row.value), y, row.colour, 4.2)
        for end, sign in ((limits[0], -1), (limits[1], 1)):
            if any(
                not inside(v) and (v > end) == (sign > 0) for v in (row.value, row.low or 0, row.high or 0)
            ):
                tip = at(end) + 2 * sign
                back = tip - 6 * sign
                canvas.rule(drawn, [(back, y + 4), (tip, y), (back, y - 4)], slot=row.colour, width=2.0)

    def table(self) -> Table:
        """One row for each arm."""
        rows = [
            [
                row.name,
                self.write(row.value),
                f"{self.write(row.low)} to {self.write(row.high)}"
                if row.low is not None and row.high is not None
                else NOTHING,
                ", ".join(self.write(value) for value in row.dots),
            ]
            for row in self.rows
        ]
        return ["", self.axis.caption, "95% interval", "by seed"], rows

    def describe(self) -> str:
        """Title, and each arm's difference."""
        parts = [f"{row.name} {self.write(row.value)}" for row in self.rows]
        return f"{self.title}, {self.axis.caption}: " + "; ".join(parts) + "."


def _dot(drawn: Any, x: float, y: float, slot: str, radius: float, alpha: float = 1.0) -> None:
    from matplotlib.patches import Circle

    drawn.add_artist(
        Circle(
            (x / 72, y / 72),
            radius / 72,
            transform=drawn.dpi_scale_trans,
            facecolor=canvas.colour(slot),
            edgecolor=canvas.colour("paper"),
            linewidth=0.6,
            alpha=alpha,
        )
    )
