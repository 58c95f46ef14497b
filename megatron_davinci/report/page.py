"""One HTML file that holds everything it shows: styles, pictures, tables, text. No script, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.files import write_atomically
from megatron_davinci.report.colors import SERIES, css_variables
from megatron_davinci.report.numbers import number
from megatron_davinci.report.plots import Plot
from megatron_davinci.version import __version__

MARKS = ("quiet", "other", "end", "aside")

_HERE = Path(__file__).parent
# Control characters (but tab and newline) and lone surrogates: what a byte-level tokenizer can put into a sample
# and what neither HTML nor UTF-8 can hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_NUMERIC = re.compile(r"^[−+-]?[\d.,]+(e-?\d+)?\s?[A-Za-z%×]{0,4}$|^–?$")


class KeyFigure(NamedTuple):
    """One figure of the strip at the top.

    Args:
        label: What it is.
        value: The figure, with its unit.
        note: What it is to be compared with, or an empty string.
        colour: A key of `colors.SERIES` that marks whose figure it is, or an empty string.
    """

    label: str
    value: str
    note: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Link:
    """A table's cell that leads to a file beside the page.

    Args:
        text: What is shown.
        href: Where it leads, relative to the page, escaped as URLs are. A page leads nowhere else.

    Raises:
        ValueError: It is absolute, or of another scheme.
    """

    text: str
    href: str

    def __post_init__(self) -> None:
        if self.href.startswith(("/", "\\")) or ":" in self.href.split("/")[0]:
            raise ValueError(f"a link should be relative to its page; found {self.href}")

    def __str__(self) -> str:
        return self.text


@dataclass
class _Section:
    title: str
    text: str
    anchor: str
    collapsed: bool
    items: list[dict[str, Any]] = field(default_factory=list)


class Page:
    """A page, built from the top down; what is added goes into the section that was begun last.

    Everything that is given as text is shown as text: it is escaped, whatever it contains.

    Args:
        title: The page's heading.
        subtitle: One line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._strips: list[list[KeyFigure]] = []
        self._notices: list[str] = []
        self._sections: list[_Section] = []
        self._plots = 0

    def figures(self, figures: Sequence[tuple[str, ...] | KeyFigure]) -> Page:
        """Add a strip of key figures to the top of the page: `(label, value, note)` each, or `KeyFigure`."""
        if figures:
            self._strips.append([KeyFigure(*figure) for figure in figures])
        return self

    def notice(self, text: str) -> Page:
        """Add a line that must be read first (what is missing, what went wrong) above every section."""
        self._notices.append(text)
        return self

    def section(self, title: str, text: str = "", *, collapsed: bool = False) -> Page:
        """Begin a section. `text` may hold several paragraphs, with an empty line between; `collapsed` folds it."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        self._sections.append(_Section(title, text, f"{anchor}-{len(self._sections) + 1}", collapsed))
        return self

    def plot(self, plot: Plot, caption: str = "") -> Page:
        """Add a plot with its caption, and its data as a table that opens on a click."""
        self._plots += 1
        headers, rows = plot.table()
        item = {
            "svg": plot.svg(f"plot{self._plots}-"),
            "title": plot.title,
            "caption": caption,
            "half": plot.half,
            "table": _table(headers, rows),
        }
        return self._add("plot", item)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Page:
        """Add a table. Floats get four significant digits; columns of numbers are set to the right."""
        return self._add("table", {"table": _table(headers, rows), "caption": caption})

    def text_block(self, text: str, *, label: str = "", lead: str = "") -> Page:
        """Add text as it is: monospace, wrapped, with its line breaks.

        Args:
            text: What is shown.
            label: A few words above it.
            lead: Text just before `text`, set apart from it (the prompt that it continues).
        """
        return self._add("text", {"text": text, "label": label, "lead": lead})

    def marked_text(self, parts: Sequence[tuple[str, str]], *, label: str = "") -> Page:
        """Add text whose parts look different, set as `text_block` sets it.

        Args:
            parts: Text and how it looks, in words of `MARKS` with spaces between: `quiet` is grey, `other` on a tint,
                `end` stands out, `aside` is no part of the text.
            label: A few words above it.

        Raises:
            ValueError: A mark is none.
        """
        unknown = {word for _, marks in parts for word in marks.split()} - set(MARKS)
        if unknown:
            raise ValueError(f"marks are {', '.join(MARKS)}; found {', '.join(sorted(unknown))}")
        return self._add("marked", {"parts": list(parts), "label": label})

    def html(self) -> str:
        """The whole page. The same calls give the same characters."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        text = environment.get_template("page.html").render(
            title=self.title,
            subtitle=self.subtitle,
            strips=self._strips,
            notices=self._notices,
            sections=self._sections,
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
            light=css_variables("light"),
            dark=css_variables("dark"),
            slots=list(SERIES),
            version=__version__,
        )
        return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)

    def write(self, path: Path) -> Path:
        """Write the page to `path`, whole or not at all, and return the path.

        Raises:
            EnvironmentProblem: The disk refused; an older page is still there.
        """
        write_atomically(Path(path), self.html().encode("utf-8"))
        return Path(path)

    def _add(self, kind: str, item: dict[str, Any]) -> Page:
        if not self._sections:
            self.section("")
        self._sections[-1].items.append({"kind": kind, **item})
        return self


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """A table ready for the template: text cells, and for each column how it is set."""
    cells = [
        [
            {"text": number(cell) if isinstance(cell, float) else str(cell), "href": _href(cell)}
            for cell in row
        ]
        for row in rows
    ]
    classes = []
    for column in range(len(headers)):
        texts = [row[column]["text"] for row in cells if column < len(row)]
        if texts and all(_NUMERIC.match(text) for text in texts):
            classes.append("num")
        else:
            # "3e-4 → 3e-5" must not be broken at its hyphen; long text must be broken somewhere.
            classes.append("short" if all(len(text) <= 18 for text in texts) else "long")
    return {"headers": list(headers), "rows": cells, "classes": classes}


def _href(cell: object) -> str:
    return cell.href if isinstance(cell, Link) else ""
