"""Paper for a plot: a box in a figure whose margins are measured from the text that goes into them.

Every length here is in points, and every text is placed by its measured width, so nothing overlaps and nothing
is cut, in the browser (where the text is set in a narrower face than the one measured) and in a PNG alike.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_davinci.report.colors import ALL
from megatron_davinci.report.curves import spread
from megatron_davinci.report.svg import themed_svg

TEXT_SIZE = 9.0
TITLE_SIZE = 11.0
LINE_HEIGHT = 13.0
PNG_DPI = 144

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same on every machine
    "font.size": TEXT_SIZE,
    "svg.fonttype": "none",
    "path.simplify": True,
    "path.simplify_threshold": 0.1,
    "axes.unicode_minus": True,
    "savefig.bbox": "standard",
    "text.usetex": False,
}


@dataclass(frozen=True)
class Box:
    """A rectangle of a figure in points, from the lower left."""

    left: float
    bottom: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The x of the right edge."""
        return self.left + self.width

    @property
    def top(self) -> float:
        """The y of the upper edge."""
        return self.bottom + self.height


def colour(slot: str) -> str:
    """The light colour of a slot of `colors.ALL`: what PNGs are drawn in, and what SVGs replace by a variable."""
    return ALL[slot].light


@contextmanager
def figure(width: float, height: float) -> Iterator[Any]:
    """An empty matplotlib figure of `width` x `height` points, within the style that everything is drawn in."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A domain may be named in a script that DejaVu Sans lacks: a box in the PNG, right in the SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        drawn = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=colour("paper"))
        FigureCanvasAgg(drawn)
        yield drawn


def to_png(drawn: Any) -> bytes:
    """The figure as PNG bytes; equal figures give equal bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(drawn: Any, *, label: str, id_prefix: str) -> str:
    """The figure as one `<svg>` element that follows the page's theme; see `svg.themed_svg`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "megatron-davinci"}):
        drawn.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return themed_svg(buffer.getvalue(), label=label, id_prefix=id_prefix)


def text_width(drawn: Any, text: str, *, bold: bool = False, size: float = TEXT_SIZE) -> float:
    """The width of one line of text in points."""
    from matplotlib.font_manager import FontProperties

    face = FontProperties(family=_STYLE["font.family"], size=size, weight="bold" if bold else "normal")
    width, _, _ = drawn.canvas.get_renderer().get_text_width_height_descent(text, face, ismath=False)
    return float(width)


def write(
    drawn: Any,
    x: float,
    y: float,
    text: str,
    *,
    slot: str = "muted",
    align: str = "left",
    vertical: str = "center",
    bold: bool = False,
    size: float = TEXT_SIZE,
) -> None:
    """Set one line of text at a point of the figure. `$` is a dollar, not mathematics."""
    drawn.text(
        x / 72,
        y / 72,
        text,
        transform=drawn.dpi_scale_trans,
        color=colour(slot),
        ha=align,
        va=vertical,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        parse_math=False,
    )


def rule(
    drawn: Any, points: Sequence[tuple[float, float]], *, slot: str, width: float = 0.8, alpha: float = 1.0
) -> None:
    """A thin line through points of the figure, outside any axes."""
    from matplotlib.lines import Line2D

    xs, ys = zip(*points)
    drawn.add_artist(
        Line2D(
            [x / 72 for x in xs],
            [y / 72 for y in ys],
            transform=drawn.dpi_scale_trans,
            color=colour(slot),
            linewidth=width,
            alpha=alpha,
            solid_capstyle="butt",
        )
    )


def set_axes(drawn: Any, axes: Any, box: Box) -> None:
    """Move `axes` to `box`."""
    width, height = drawn.get_figwidth() * 72, drawn.get_figheight() * 72
    axes.set_position((box.left / width, box.bottom / height, box.width / width, box.height / height))


def shorten(drawn: Any, text: str, room: float, *, bold: bool = False) -> str:
    """`text`, its end replaced by an ellipsis where it is wider than `room` points."""
    if text_width(drawn, text, bold=bold) <= room:
        return text
    while text and text_width(drawn, text + "…", bold=bold) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def end_labels(
    drawn: Any, box: Box, labels: Sequence[tuple[str, str, float, float]], *, gap: float = LINE_HEIGHT
) -> None:
    """Names to the right of the axes, each at the height of its line's end, moved apart where they would touch.

    Args:
        drawn: The figure.
        box: Where the axes are.
        labels: `(text, slot, x, y)`: a line's name and colour, and the point of the figure where it ends.
        gap: The least distance between two names, in points.
    """
    heights = spread([y for _, _, _, y in labels], gap, box.bottom + gap / 4, box.top - gap / 4)
    for (text, slot, x, y), height in zip(labels, heights):
        edge = box.right
        path = [(max(x, edge) + 1, y), (edge + 4, y), (edge + 9, height), (edge + 12, height)]
        if x < edge - 2:
            path.insert(0, (x + 2, y))
        rule(drawn, path, slot=slot, alpha=0.55)
        write(drawn, edge + 15, height, text, slot=slot, bold=True, vertical="center_baseline")
