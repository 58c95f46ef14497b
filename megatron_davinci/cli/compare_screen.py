"""What `davinci compare` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_davinci.cli.eval_screen import FORMAT_COLUMNS, format_row
from megatron_davinci.cli.screen import Screen

if TYPE_CHECKING:
    from megatron_davinci.evaluate.comparing import Compared, InFormats
    from megatron_davinci.stats.rankings import Agreement

_NAMED = 3  # reversed pairs that a table's row names
NOTHING = "–"


class Shown(NamedTuple):
    """A table.

    Attributes:
        title: What it is about.
        text: How it is to be read.
        columns: Names, and how they are set.
        rows: At least one.
    """

    title: str
    text: str
    columns: list[tuple[str, Any]]
    rows: list[list[str]]


def tables(compared: Compared) -> list[Shown]:
    """All tables that have anything in them."""
    every = [
        Shown(
            "Rankings by likelihood and by generation",
            "Kendall's tau of the checkpoints' order in both protocols, with a 95% interval over items, and "
            "what each protocol's is with itself between halves of the items. A pair is reversed where both find "
            "a difference beyond the noise of items and the two are opposite (Holm over all pairs).",
            *protocol_table(compared.protocols),
        ),
        Shown(
            "In several formats",
            "The same items by likelihood in several formats: the standard deviation of scores over formats, what is "
            "left of it beyond the noise of items, an item's standard error beside it, and the p-value of formats "
            "that can be exchanged (Cochran's Q).",
            *formats_table(compared.formats),
        ),
    ]
    return [table for table in every if table.rows]


def show(compared: Compared) -> None:
    """Print them."""
    screen = Screen()
    there = tables(compared)
    for table in there:
        screen.table(table.title.lower(), table.columns, table.rows)
        screen.console.print()
    if not there:
        screen.console.print(
            "Nothing to compare: no task was asked in two protocols at two checkpoints, or in several formats "
            "(davinci eval --suite local; --both-ways; --formats)."
        )


def protocol_table(
    protocols: Mapping[str, Agreement],
) -> tuple[list[tuple[str, Any]], list[list[str]]]:
    """How the two protocols' rankings agree, and who is reversed."""
    columns: list[tuple[str, Any]] = [
        ("task", "left"),
        ("models", "right"),
        ("items", "right"),
        ("tau", "right"),
        ("95%", "left"),
        ("with themselves", "left"),
        ("pairs in opposite order", "right"),
        ("reversed beyond noise", "left"),
    ]
    rows = []
    for name, found in protocols.items():
        flips = sum(pair.flips for pair in found.pairs)
        rows.append(
            [
                name,
                str(len(found.models)),
                f"{found.items:,}",
                number(found.tau),
                f"{number(found.low)} to {number(found.high)}" if math.isfinite(found.low) else "",
                " / ".join(number(own) for own in found.own),
                f"{flips} of {len(found.pairs)}",
                reversals(found),
            ]
        )
    return columns, rows


def reversals(found: Agreement) -> str:
    """The reversed pairs, the widest swings first, with both differences; or why there can be none."""
    if not math.isfinite(found.tau):
        return "none: one protocol has all alike"
    pairs = sorted((pair for pair in found.pairs if pair.reversed), key=lambda pair: -abs(pair.swing))
    said = [
        f"{pair.first} and {pair.second} ({100 * pair.one:+.1f}, {100 * pair.other:+.1f} points)"
        for pair in pairs[:_NAMED]
    ]
    more = [f"{len(pairs) - _NAMED} more"] if len(pairs) > _NAMED else []
    few = "" if math.isfinite(found.low) else ": too few items tell them apart"
    return "; ".join(said + more) or f"none{few}"


def formats_table(found: Sequence[InFormats]) -> tuple[list[tuple[str, Any]], list[list[str]]]:
    """What formats do to scores, by task and model."""
    columns = [FORMAT_COLUMNS[0], ("model", "left"), *FORMAT_COLUMNS[1:]]
    rows = []
    for one in found:
        name, *rest = format_row(one.task, one.formats, one.spread)
        rows.append([name, one.model, *rest])
    return columns, rows


def number(value: float) -> str:
    """Two digits, or a dash for what is no number."""
    return f"{value:.2f}" if math.isfinite(value) else NOTHING
