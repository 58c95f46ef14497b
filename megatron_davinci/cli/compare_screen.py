"""What `davinci compare` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_davinci.cli.eval_screen import FORMAT_COLUMNS, format_row
from megatron_davinci.cli.screen import Screen
from megatron_davinci.evaluate.naming import stem_of
from megatron_davinci.report.numbers import quantity

if TYPE_CHECKING:
    from megatron_davinci.evaluate.comparing import Compared, InFormats
    from megatron_davinci.evaluate.foresight import Course, Foretold
    from megatron_davinci.evaluate.item_scores import ItemScores
    from megatron_davinci.stats.memory import Memory
    from megatron_davinci.stats.rankings import Agreement
    from megatron_davinci.stats.subsets import DiscriminativeSubset

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
        Shown(
            "What early checkpoints say",
            "From how many tokens on a task is above chance (95%, at all later checkpoints too); how far the items "
            "were in their last order half-way (Kendall's tau); and how wrong the value half-way was as a forecast "
            "of the last one, and a straight line over the logarithm of tokens, beside the noise of one measurement.",
            *courses_table(compared.courses),
        ),
        Shown(
            "Which measurement decides early",
            "The order of the runs by an early measurement against their order at the last checkpoint that all have: "
            "Kendall's tau, and the share of pairs in the right order.",
            *foretold_table(compared.foretold),
        ),
        Shown(
            "What became of made-up facts",
            "Log-probability of the answers in nats: before, at its highest and now. Retained is the share of the "
            "rise that is left, the decay its loss with every tenfold of tokens since the highest point.",
            *memories_table(compared.memories),
        ),
        Shown(
            "The fewest items that rank alike",
            "Items chosen on a random half of the checkpoints by how well they tell them apart, and judged on the "
            "other half: Kendall's tau with the ranking by all items, and that of as many items at random.",
            *subsets_table(compared.subsets),
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
            "Nothing to compare: no two checkpoints were asked the same task in the same way, and no task in several "
            "formats (davinci eval --suite local --follow; --both-ways; --formats)."
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


def courses_table(found: Sequence[Course]) -> tuple[list[tuple[str, Any]], list[list[str]]]:
    """What the first half of a run says of its end, by task."""
    several = len({one.run for one in found}) > 1
    columns: list[tuple[str, Any]] = [
        ("task", "left"),
        *([("run", "left")] if several else []),
        ("protocol", "left"),
        ("above chance from", "right"),
        ("half-way", "right"),
        ("items in last order", "right"),
        ("last", "right"),
        ("off, as it was", "right"),
        ("off, by trend", "right"),
        ("noise", "left"),
    ]
    rows = []
    for one in found:
        forecast = one.forecast
        values = (forecast.last, forecast.naive, forecast.trend, forecast.noise) if forecast else ()
        never = "" if one.chance is None else "not yet"
        rows.append(
            [
                stem_of(one.task),
                *([one.run] if several else []),
                one.protocol,
                quantity(one.above_chance) if one.above_chance is not None else never,
                quantity(one.half) if one.half is not None else "",
                number(one.settled),
                *(f"{value:{'+' if place in (1, 2) else ''}.3f}" for place, value in enumerate(values)),
                *([] if values else [""] * 4),
            ]
        )
    return columns, rows


def foretold_table(found: Sequence[Foretold]) -> tuple[list[tuple[str, Any]], list[list[str]]]:
    """Which early measurement has the runs in their last order, by task."""
    columns: list[tuple[str, Any]] = [
        ("at the end", "left"),
        ("at step", "right"),
        ("tau", "right"),
        ("pairs", "right"),
        ("right", "right"),
        ("by", "left"),
    ]
    rows = [
        [
            one.target,
            f"{one.step:,}",
            number(one.decision.tau),
            str(one.decision.pairs),
            f"{one.decision.right:.0%}" if math.isfinite(one.decision.right) else NOTHING,
            one.by,
        ]
        for one in found
    ]
    return columns, rows


def memories_table(
    found: Sequence[tuple[ItemScores, str, Memory]],
) -> tuple[list[tuple[str, Any]], list[list[str]]]:
    """How facts were acquired and forgotten, by kind of probe and by condition."""
    several = len({run for _, run, _ in found}) > 1
    columns: list[tuple[str, Any]] = [
        ("probe", "left"),
        ("facts", "left"),
        *([("run", "left")] if several else []),
        ("before", "right"),
        ("highest", "right"),
        ("at", "right"),
        ("now", "right"),
        ("retained", "right"),
        ("decay", "right"),
        ("nothing left after", "left"),
    ]
    rows = [
        [
            task.protocol,
            task.task.removeprefix("facts_").removesuffix(f"_{task.protocol}"),
            *([run] if several else []),
            number(one.before),
            number(one.peak),
            quantity(one.peak_tokens),
            number(one.last),
            f"{one.retained:.0%}" if math.isfinite(one.retained) else NOTHING,
            number(one.decay),
            quantity(one.threshold) if math.isfinite(one.threshold) else NOTHING,
        ]
        for task, run, one in found
    ]
    return columns, rows


def subsets_table(
    found: Sequence[tuple[ItemScores, DiscriminativeSubset]],
) -> tuple[list[tuple[str, Any]], list[list[str]]]:
    """How few items are enough, by task."""
    columns: list[tuple[str, Any]] = [
        ("task", "left"),
        ("protocol", "left"),
        ("models", "right"),
        ("items", "right"),
        ("enough", "left"),
        ("tau on others", "right"),
        ("at random", "left"),
    ]
    rows = []
    for task, subset in found:
        shown = ["no fewer", "", ""]
        if subset.found:
            shown = [f"{len(subset.items):,}", number(subset.tau), number(subset.random)]
        rows.append([stem_of(task.task), task.protocol, str(len(task.models)), f"{subset.of:,}", *shown])
    return columns, rows


def number(value: float) -> str:
    """Two digits, or a dash for what is no number."""
    return f"{value:.2f}" if math.isfinite(value) else NOTHING
