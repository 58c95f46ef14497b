"""A screen for what a command answers: plain, and as wide as it is, where the output is no terminal."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_davinci.data.explain import printable

_WIDE = 4000  # columns of a file or a pipe
_NAME = 40  # columns for a name that someone made very long
_NUMBER = 32  # columns for numbers, of which nothing may be cut, and for the names above them
_WORD = 8  # columns that text has at least
Answer = dict[str, Any]


class Screen:
    """Where to print; what comes from outside passes through `safe`."""

    def __init__(self) -> None:
        wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        # No markup: what is shown has brackets and colons of its own.
        self.console = Console(highlight=False, markup=False, emoji=False, width=_WIDE if wide else None)

    def safe(self, text: object, *, lines: bool = False) -> str:
        """Text without what a terminal would obey."""
        return printable(str(text), lines=lines)

    def facts(self, rows: list[tuple[str, str]]) -> None:
        """Names and values."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(name, Text(self.safe(value)))
        self.console.print(grid)

    def table(self, title: str, columns: list[tuple[str, JustifyMethod]], rows: list[list[str]]) -> None:
        """A table of numbers and names. Where there is no room, text goes on in the next line, the longest first."""
        cells = [[self.safe(cell) for cell in row] for row in rows]
        heads = [(self.safe(name), justify) for name, justify in columns]
        contents = list(zip(*([name for name, _ in heads], *cells), strict=True))
        widths = [max(cell_len(cell) for cell in column) for column in contents]
        words = [max(cell_len(word) for cell in column for word in cell.split(" ")) for column in contents]
        last = len(heads) - 1
        texts = [at for at, (_, justify) in enumerate(heads) if justify == "left" or at == last]
        widths = [
            width if at == last else min(width, _NAME if at in texts else _NUMBER)
            for at, width in enumerate(widths)
        ]
        # rich leaves two columns behind the last one too.
        room = self.console.width - 2 * len(widths)
        for least in (words, [_WORD] * len(words)):  # a word is taken apart where nothing else helps
            while sum(widths) > room and (wide := [at for at in texts if widths[at] > least[at]]):
                widths[max(wide, key=lambda at: widths[at])] -= 1
        table = Table(
            title=title, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )  # fmt: skip
        for at, ((name, justify), width) in enumerate(zip(heads, widths, strict=True)):
            table.add_column(
                name,
                justify=justify,
                no_wrap=at not in texts,
                overflow="fold" if at in texts else "ellipsis",
                width=width,
            )
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    def text(self, title: str, facts: Answer, *, counted: bool = True) -> None:
        """The text of some tokens, or their ids."""
        if facts["text"] is not None:
            count, parts = facts["text"]["characters"], facts["text"]
            first, last = len(parts["first"]), len(parts["last"])
            title += f", {count:,} characters" if counted else ""
            title += f": the first {first} and the last {last}" if counted and first + last < count else ""
        elif facts["ids"] is not None:
            parts = {end: " ".join(map(str, facts["ids"][end])) for end in ("first", "last")}
            title += ", as token ids"
        else:
            return
        self.console.print()
        self.console.print(Text(title, style="italic"))
        for i, part in enumerate([parts["first"], *([parts["last"]] if parts["last"] else [])]):
            if i:
                self.console.print(Text("  [...]", style="dim"))
            body = Text(self.safe(part, lines=True).expandtabs(4))
            self.console.print(Padding(body, (0, 0, 0, 2), expand=False))


def print_captured(text: str) -> None:
    """Print what a console captured, without the spaces that tables fill their width with."""
    text = "\n".join(line.rstrip(" ") for line in text.split("\n")).rstrip("\n")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def can_print(characters: str) -> bool:
    """Whether the output's encoding has these characters."""
    try:
        characters.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
