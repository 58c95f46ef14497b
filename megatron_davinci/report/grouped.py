"""Bars in groups: for each domain one bar an arm, with its interval, so that arms are compared where they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_davinci.report import canvas
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.canvas import LINE_HEIGHT, Box
from megatron_davinci.report.numbers import NOTHING, alike
from megatron_davinci.report.plots import Bar, Plot, Table

_BAR, _GAP = 13.0, 9.0  # heights of a bar's row and of the room between groups, in points
_HEAD = LINE_HEIGHT + 12.0


@dataclass(frozen=True)
class Group:
    """Bars that belong together: one domain, one task.

    Attributes:
        name: Written at the left.
        bars: One for each arm, the same arms in the same order in every group.
    """

    name: str
    bars: Sequence[Bar]


@dataclass(frozen=True, kw_only=True)
class GroupedBars(Plot):
    """Horizontal bars from zero, in groups; whose a bar is stands in its colour above the plot.

    Args:
        value: The axis of the values.
        groups: From the top down.
        write: How a value is written; by default with as many decimals as give the largest three digits.
    """

    value: Axis
    groups: Sequence[Group]
    write: Callable[[float], str] | None = None

    @property
    def size(self) -> tuple[float, float]:
        """As high as its bars need, with a line for each row of names."""
        bars = sum(len(group.bars) for group in self.groups)
        legend = LINE_HEIGHT * -(-len(self._arms()) // 4)
        return super().size[0], _HEAD + legend + _BAR * bars + _GAP * len(self.groups) + 6

    def _arms(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((bar.name, bar.colour) for group in self.groups for bar in group.bars))

    def _writer(self) -> Callable[[float], str]:
        values = [abs(bar.value) for group in self.groups for bar in group.bars if math.isfinite(bar.value)]
        return self.write or alike(max(values, default=0.0))

    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """See `Plot.draw`."""
        y, write = box.top, self._writer()
        if titled:
            title = canvas.shorten(drawn, self.title, box.width / 1.25, bold=True)
            canvas.write(drawn, box.left, y - 8, title, slot="ink", bold=True, size=canvas.TITLE_SIZE)
            y -= 20
        canvas.write(drawn, box.left, y - 6, self.value.caption)
        if self.note:
            canvas.write(drawn, box.right, y - 6, self.note, align="right")
        y = self._names(drawn, box, y - LINE_HEIGHT - 6)
        bars = [bar for group in self.groups for bar in group.bars]
        names = {
            group.name: canvas.shorten(drawn, group.name, 0.3 * box.width, bold=True) for group in self.groups
        }
        left = box.left + 20  # a browser's face may be a little wider than the one measured
        left += max((canvas.text_width(drawn, name, bold=True) for name in names.values()), default=0.0)
        widest = max((canvas.text_width(drawn, write(bar.value), bold=True) for bar in bars), default=0.0)
        right = box.right - widest - 10
        marks = [
            v for bar in bars for v in (bar.value, bar.low, bar.high) if v is not None and math.isfinite(v)
        ]
        low, high = min([0.0, *marks]), max([0.0, *marks])

        def at(value: float) -> float:
            return left + (right - left) * (value - low) / ((high - low) or 1.0)

        for group in self.groups:
            middle = y - _BAR * len(group.bars) / 2
            canvas.write(
                drawn, left - 12, middle, names[group.name], slot="ink", align="right", bold=True,
                vertical="center_baseline",
            )  # fmt: skip
            for index, bar in enumerate(group.bars):
                _bar(drawn, at, y - (index + 0.5) * _BAR, bar, write(bar.value))
            canvas.rule(drawn, [(at(0.0), y), (at(0.0), y - _BAR * len(group.bars))], slot="muted")
            y -= _BAR * len(group.bars) + _GAP

    def _names(self, drawn: Any, box: Box, y: float) -> float:
        """Whose bar has which colour, four to a line; where the bars may begin."""
        arms = self._arms()
        for index, (name, slot) in enumerate(arms):
            row, column = divmod(index, 4)
            text = canvas.shorten(drawn, name, box.width / 4 - 8, bold=True)
            canvas.write(
                drawn, box.left + column * box.width / 4, y - row * LINE_HEIGHT, text, slot=slot, bold=True
            )
        return y - LINE_HEIGHT * -(-len(arms) // 4)

    def table(self) -> Table:
        """A row for each bar."""
        write = self._writer()
        rows = [
            [
                group.name,
                bar.name,
                write(bar.value),
                NOTHING if bar.low is None or bar.high is None else f"{write(bar.low)} to {write(bar.high)}",
            ]
            for group in self.groups
            for bar in group.bars
        ]
        return ["", "", self.value.caption, "interval"], rows

    def describe(self) -> str:
        """Title, axis, and every bar's value."""
        write = self._writer()
        parts = [
            f"{group.name}: " + ", ".join(f"{bar.name} {write(bar.value)}" for bar in group.bars)
            for group in self.groups
        ]
        return f"{self.title}, {self.value.caption}. " + "; ".join(parts) + "."


def _bar(drawn: Any, at: Callable[[float], float], y: float, bar: Bar, text: str) -> None:
    from matplotlib.patches import Rectangle

    if not math.isfinite(bar.value):
        return
    a, b = sorted((at(0.0), at(bar.value)))
    drawn.add_artist(
        Rectangle(
            (a / 72, (y - 0.38 * _BAR) / 72),
            (b - a) / 72,
            0.76 * _BAR / 72,
            transform=drawn.dpi_scale_trans,
            facecolor=canvas.colour(bar.colour),
            alpha=0.85,
            linewidth=0,
        )
    )
    text_from = b + 6
    if bar.low is not None and bar.high is not None:
        canvas.rule(drawn, [(at(bar.low), y), (at(bar.high), y)], slot="ink", width=1.3)
        for edge in (bar.low, bar.high):
            canvas.rule(drawn, [(at(edge), y - 2.5), (at(edge), y + 2.5)], slot="ink", width=1.3)
        text_from = max(text_from, at(bar.high) + 6)
    canvas.write(drawn, text_from, y, text, slot="ink", bold=True, vertical="center_baseline")
