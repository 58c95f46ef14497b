"""The plots of every page: lines, stacked shares, bars. Each renders to SVG, to PNG and to a table.

A plot is a frozen description (arrays, names, units); nothing is drawn until it is asked for. Lines are labelled
at their ends instead of in a legend, stages at the top, and every series has one colour wherever it appears.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.report import axes as drawing
from megatron_davinci.report import canvas
from megatron_davinci.report.axes import Axis, Stage
from megatron_davinci.report.canvas import Box
from megatron_davinci.report.curves import downsample
from megatron_davinci.report.numbers import NOTHING, alike, number, percent

WIDE = (748.0, 280.0)
HALF = (366.0, 230.0)
MAX_POINTS = 2000
TABLE_ROWS = 40

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class Plot(ABC):
    """What every plot has.

    Args:
        title: What is plotted, a few words; also its file name.
        half: Half the page wide, so that two stand side by side.
        note: A few words at the top right of the plot ("dashed: bigram").
    """

    title: str
    half: bool = False
    note: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in points."""
        return HALF if self.half else WIDE

    @abstractmethod
    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """Draw into `box` of a figure; `titled` puts the title on top (a PNG stands alone)."""

    @abstractmethod
    def table(self) -> Table:
        """The data as `(headers, rows)` of text; long series are thinned evenly to about 40 rows."""

    @abstractmethod
    def describe(self) -> str:
        """The picture in words, for who does not see it."""

    def svg(self, id_prefix: str = "plot-") -> str:
        """One `<svg>` element whose colours follow the page's theme. `id_prefix` must differ within a page."""
        with canvas.figure(*self.size) as drawn:
            self.draw(drawn, Box(0, 0, *self.size), titled=False)
            return canvas.to_svg(drawn, label=self.describe(), id_prefix=id_prefix)

    def png(self) -> bytes:
        """The plot on white, with its title, at 144 dots per inch."""
        return grid_png([self], columns=1)


def grid_png(plots: Sequence[Plot], *, columns: int, heading: str = "") -> bytes:
    """Several plots (at least one) in one PNG, row by row; the first says how wide all are."""
    width = plots[0].size[0]
    rows = [plots[first : first + columns] for first in range(0, len(plots), columns)]
    heights = [max(plot.size[1] for plot in row) + canvas.LINE_HEIGHT * 2 for row in rows]
    margin, top = 14.0, 30.0 if heading else 0.0
    full_width = columns * width + (columns + 1) * margin
    full_height = sum(heights) + (len(rows) + 1) * margin + top
    with canvas.figure(full_width, full_height) as drawn:
        if heading:
            text = canvas.shorten(drawn, heading, (full_width - 2 * margin) / 1.6, bold=True)
            canvas.write(drawn, margin, full_height - 24, text, slot="ink", bold=True, size=14)
        bottom = full_height - top
        for row, height in zip(rows, heights):
            bottom -= height + margin
            for column, plot in enumerate(row):
                left = margin + column * (width + margin)
                plot.draw(drawn, Box(left, bottom, width, height), titled=True)
        return canvas.to_png(drawn)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Args:
        name: Written at the line's end (nothing is written where it is empty).
        x: `[n]`, not decreasing, in the unit of the x axis.
        y: `[n]`, in the unit of the y axis; at points that are not finite the line has a gap.
        colour: A key of `colors.SERIES`.
        faint: `[n]` or None: the raw values that `y` is a mean of, drawn faintly behind it.
        level: A constant to compare with, drawn as a dashed line of the same colour.
        band: `[n]` or None: how far up and down `y` is uncertain, drawn as an area behind it.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    colour: str = "blue"
    faint: ArrayLike | None = None
    level: float | None = None
    band: ArrayLike | None = None

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
        """`x`, `y` and `faint` as float arrays."""
        faint = None if self.faint is None else np.asarray(self.faint, dtype=np.float64)
        return np.asarray(self.x, dtype=np.float64), np.asarray(self.y, dtype=np.float64), faint


@dataclass(frozen=True, kw_only=True)
class LinePlot(Plot):
    """Lines over a common x axis.

    Args:
        x: The x axis.
        y: The y axis.
        series: The lines.
        stages: Named ranges of x: a thin rule at each boundary, the name at the top.
        steps: Draw each value as held until the next (a batch size, a schedule).
        skip_start: The share of the x range, from its start, that does not set the y range: a loss falls from
            11 to 4 in its first percent, and the rest of the run deserves the plot's height. What is cut off is
            said in the plot.
    """

    x: Axis
    y: Axis
    series: Sequence[Series]
    stages: Sequence[Stage] = ()
    steps: bool = False
    skip_start: float = 0.0

    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """See `Plot.draw`."""
        lines = [(one, *one.arrays()) for one in self.series]
        xs = np.concatenate([x for _, x, _, _ in lines] or [np.empty(0)])
        x_range = self.x.range(xs)
        cut_before = x_range[0] + self.skip_start * (x_range[1] - x_range[0])
        everything, lasting = [], []
        for one, x, y, faint in lines:
            for values in (y, faint):
                if values is not None:
                    everything.append(values)
                    lasting.append(values[x >= cut_before])
            if one.level is not None:
                lasting.append(np.array([one.level]))
            if one.band is not None:
                half = np.asarray(one.band, dtype=np.float64)
                lasting += [(y - half)[x >= cut_before], (y + half)[x >= cut_before]]
        y_range = self.y.range(np.concatenate(lasting or [np.empty(0)]))
        names = [(one.name, one.colour) for one in self.series if one.name]
        frame = drawing.Frame(
            drawn,
            box,
            x=self.x,
            y=self.y,
            x_range=x_range,
            y_range=y_range,
            names=[name for name, _ in names],
        )
        note, highest = self.note, _highest(everything)
        if highest > frame.y_range[1]:
            note = "; ".join(
                part for part in (note, f"the start, up to {number(highest, 3)}, is cut off") if part
            )
        frame.head(self.title if titled else "", note, self.stages)
        style: dict[str, Any] = {"drawstyle": "steps-post"} if self.steps else {}
        ends = []
        for one, x, y, faint in lines:
            ink = canvas.colour(one.colour)
            if faint is not None:
                kept = downsample(x, faint, MAX_POINTS, log_x=self.x.log)
                frame.axes.plot(*_with_gaps(x, faint, kept), color=ink, alpha=0.22, linewidth=0.7, **style)
            if one.level is not None:
                frame.axes.axhline(one.level, color=ink, linewidth=1.1, dashes=(4, 3), alpha=0.8)
            kept = downsample(x, y, MAX_POINTS, log_x=self.x.log)
            if not len(kept):
                continue
            if one.band is not None:
                half = np.asarray(one.band, dtype=np.float64)[kept]
                low, high = y[kept] - half, y[kept] + half
                frame.axes.fill_between(x[kept], low, high, color=ink, alpha=0.13, linewidth=0)
            few = (len(kept) <= 40 and not self.steps) or len(kept) == 1
            drawn_x, drawn_y = _with_gaps(x, y, kept)
            frame.axes.plot(
                drawn_x, drawn_y, color=ink, linewidth=1.7, marker="o" if few else None, markersize=3, **style
            )
            alone = np.isnan(np.r_[np.nan, drawn_y[:-1]]) & np.isnan(np.r_[drawn_y[1:], np.nan])
            if not few and alone.any():
                frame.axes.plot(
                    drawn_x[alone], drawn_y[alone], color=ink, linestyle="", marker="o", markersize=1.7
                )
            last = float(x[kept[-1]]), float(y[kept[-1]])
            if few and last[1] <= frame.y_range[1]:
                # On the right edge the axes would cut it in half.
                frame.axes.plot(*last, color=ink, marker="o", markersize=3, clip_on=False)
            ends.append((one.name, one.colour, *last))
        frame.finish([end for end in ends if end[0]], empty=not ends)

    def table(self) -> Table:
        """One row for each x where the series share it, else one for each point of each series."""
        lines = [(one, *one.arrays()) for one in self.series]
        if not lines:
            return [self.x.caption], []
        first = lines[0][1]
        if all(len(x) == len(first) and np.array_equal(x, first) for _, x, _, _ in lines):
            columns: list[tuple[str, NDArray[np.float64]]] = []
            for one, _, y, faint in lines:
                if faint is not None:
                    columns.append((f"{one.name or self.y.label} (raw)", faint))
                columns.append(((one.name or self.y.label) + (" (mean)" if faint is not None else ""), y))
            rows = [
                [self.x.write(first[i]), *(self.y.write(y[i]) for _, y in columns)]
                for i in _thinned(len(first))
            ]
            return [self.x.caption, *(name for name, _ in columns)], rows
        rows = []
        for one, x, y, _ in lines:
            rows += [[one.name, self.x.write(x[i]), self.y.write(y[i])] for i in _thinned(len(x))]
        return ["series", self.x.caption, self.y.caption], rows

    def describe(self) -> str:
        """Title, axes, and where each line starts and ends."""
        parts = [f"{self.title}: {self.y.caption} against {self.x.caption}."]
        for one, x, y, _ in ((one, *one.arrays()) for one in self.series):
            kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
            if not len(kept):
                continue
            a, b = kept[0], kept[-1]
            start, end = (f"{self.y.write(y[i])} at {self.x.write(x[i])}" for i in (a, b))
            level = "" if one.level is None else f", compared with {self.y.write(one.level)}"
            parts.append(f"{one.name or 'The line'} goes from {start} to {end}{level}.")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class StackedArea(Plot):
    """Shares of a whole that hold from one point to the next: a mixture over time.

    Args:
        x: The x axis.
        edges: `[n + 1]`, increasing: share `i` holds from `edges[i]` to `edges[i + 1]`.
        bands: `(name, colour, shares [n])` from the bottom up; shares are fractions of 1.
        stages: As in `LinePlot`.
    """

    x: Axis
    edges: ArrayLike
    bands: Sequence[tuple[str, str, ArrayLike]]
    stages: Sequence[Stage] = ()

    @property
    def size(self) -> tuple[float, float]:
        """As high as the names of its bands need, one above the other."""
        width, height = super().size
        return width, max(height, 80.0 + canvas.LINE_HEIGHT * len(self.bands))

    def _shares(self) -> NDArray[np.float64]:
        return np.array([np.asarray(values, dtype=np.float64) for _, _, values in self.bands])

    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """See `Plot.draw`."""
        self.frame(drawn, box, titled=titled)

    def frame(self, drawn: Any, box: Box, *, titled: bool) -> drawing.Frame:
        """Draw, and return the axes for what is to be drawn over them."""
        edges, shares = np.asarray(self.edges, dtype=np.float64), self._shares()
        axis = Axis("share", "%", zero=True)
        labels = [f"{name} {percent(values[-1], 2)}" for (name, _, _), values in zip(self.bands, shares)]
        frame = drawing.Frame(
            drawn, box, x=self.x, y=axis, x_range=self.x.range(edges), y_range=(0.0, 100.0), names=labels
        )
        frame.head(self.title if titled else "", self.note, self.stages)
        base = np.zeros(len(edges))
        ends = []
        for (_, slot, _), values, label in zip(self.bands, shares, labels):
            held = 100 * np.r_[values, values[-1]]
            frame.axes.fill_between(
                edges, base, base + held, step="post", color=canvas.colour(slot), alpha=0.78, linewidth=0
            )
            # A hairline of paper between two bands says where one ends, whatever the colours look like.
            frame.axes.step(edges, base + held, where="post", color=canvas.colour("paper"), linewidth=0.8)
            if held[-1] > 0:
                ends.append((label, slot, float(edges[-1]), float(base[-1] + held[-1] / 2)))
            base = base + held
        frame.finish(ends, empty=not self.bands)
        return frame

    def table(self) -> Table:
        """One row for each range of x."""
        edges, shares = np.asarray(self.edges, dtype=np.float64), self._shares()
        rows = [
            [self.x.write(edges[i]), self.x.write(edges[i + 1]), *(percent(values[i]) for values in shares)]
            for i in _thinned(len(edges) - 1)
        ]
        return [f"from ({self.x.caption})", "to", *(name for name, _, _ in self.bands)], rows

    def describe(self) -> str:
        """Title, axis, and each band's share at the start and at the end."""
        shares = self._shares()
        parts = [
            f"{name} from {percent(values[0])} to {percent(values[-1])}"
            for (name, _, _), values in zip(self.bands, shares)
        ]
        return f"{self.title}: shares against {self.x.caption}. " + "; ".join(parts) + "."


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value, and optionally an interval around it and a value to compare it with."""

    name: str
    value: float
    colour: str = "blue"
    low: float | None = None
    high: float | None = None
    reference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bars(Plot):
    """Horizontal bars from zero, each with its value written beside it.

    Args:
        value: The axis of the values.
        bars: From the top down.
        write: How a value is written at its bar's end; by default with as many decimals as give the largest
            three digits, the same for all.
    """

    value: Axis
    bars: Sequence[Bar]
    write: Callable[[float], str] | None = None

    @property
    def size(self) -> tuple[float, float]:
        """As high as its bars need."""
        return super().size[0], 36.0 + 27.0 * max(2, len(self.bars))

    def _writer(self) -> Callable[[float], str]:
        largest = max((abs(bar.value) for bar in self.bars if np.isfinite(bar.value)), default=0.0)
        return self.write or alike(largest)

    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """See `Plot.draw`."""
        drawing.draw_bars(
            drawn,
            box,
            title=self.title if titled else "",
            note=self.note,
            axis=self.value,
            write=self._writer(),
            bars=[(b.name, b.value, b.colour, b.low, b.high, b.reference) for b in self.bars],
        )

    def table(self) -> Table:
        """One row for each bar; a column for the interval and the reference where a bar has them."""
        write = self._writer()
        headers = ["", self.value.caption]
        intervals = any(bar.low is not None for bar in self.bars)
        references = any(bar.reference is not None for bar in self.bars)
        rows = []
        for bar in self.bars:
            row = [bar.name, write(bar.value)]
            if intervals:
                known = bar.low is not None and bar.high is not None
                row.append(f"{write(bar.low or 0.0)} to {write(bar.high or 0.0)}" if known else NOTHING)
            if references:
                row.append(NOTHING if bar.reference is None else write(bar.reference))
            rows.append(row)
        return headers + ["interval"] * intervals + ["reference"] * references, rows

    def describe(self) -> str:
        """Title, axis, and each bar's value."""
        write = self._writer()
        parts = [
            f"{bar.name} {write(bar.value)}"
            + ("" if bar.reference is None else f" (reference {write(bar.reference)})")
            for bar in self.bars
        ]
        return f"{self.title}, {self.value.caption}: " + "; ".join(parts) + "."


def _with_gaps(
    x: NDArray[np.float64], y: NDArray[np.float64], kept: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The kept points, with one that is not a number wherever `y` has such between two: a line ends there."""
    missing = np.cumsum(~np.isfinite(y))[kept]
    gaps = np.flatnonzero(np.diff(missing)) + 1
    return np.insert(x[kept], gaps, np.nan), np.insert(y[kept], gaps, np.nan)


def _highest(arrays: Sequence[NDArray[np.float64]]) -> float:
    finite = [float(np.max(values[np.isfinite(values)])) for values in arrays if np.isfinite(values).any()]
    return max(finite, default=-np.inf)


def _thinned(n: int) -> list[int]:
    """At most `TABLE_ROWS` indices of `range(n)`, evenly spread, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, n - 1, min(n, TABLE_ROWS)).round())] if n else []
