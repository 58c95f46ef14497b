"""The mixture of a run, past and planned: a picture of it, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_davinci.report import canvas
from megatron_davinci.report.axes import Axis, Stage
from megatron_davinci.report.canvas import Box
from megatron_davinci.report.colors import assign
from megatron_davinci.report.numbers import percent, quantity
from megatron_davinci.report.page import Page
from megatron_davinci.report.plots import Bar, Bars, Plot, StackedArea, grid_png

TOKENS = Axis("tokens", "tokens", zero=True)


@dataclass(frozen=True)
class Change:
    """A mixture that holds from a point on.

    Attributes:
        tokens: From here on.
        step: The first step that it governs.
        stage: Whose it is.
        who: Who changed it; empty for the stage's own.
        reason: Why.
        is_planned: Whether it is still to come.
        shares: Fractions of 1 by source.
    """

    tokens: float
    step: int
    stage: str
    who: str
    reason: str
    is_planned: bool
    shares: Mapping[str, float]


@dataclass(frozen=True)
class SourceUse:
    """What a source gave and will give, in tokens."""

    name: str
    domain: str
    has: float
    gave: float
    planned: float


@dataclass(frozen=True, kw_only=True)
class MixtureOverRun(StackedArea):
    """Shares over a run, paler where they are planned; changes that are no stage's have a number.

    Args:
        now: Where the run is.
        marks: Where somebody changed the mixture, in their order.
    """

    now: float = 0.0
    marks: Sequence[float] = ()

    def draw(self, drawn: Any, box: Box, *, titled: bool) -> None:
        """See `Plot.draw`."""
        frame = self.frame(drawn, box, titled=titled)
        low, high = frame.x_range
        axes = frame.axes
        if self.now < high:
            axes.axvspan(max(low, self.now), high, color=canvas.colour("paper"), alpha=0.45, linewidth=0)
        axes.axvline(self.now, color=canvas.colour("ink"), linewidth=1.6)
        for number, mark in enumerate(self.marks, start=1):
            axes.axvline(mark, color=canvas.colour("ink"), linewidth=0.9, linestyle=(0, (3, 2)))
            axes.text(
                mark,
                3,
                str(number),
                color=canvas.colour("ink"),
                ha="left",
                va="bottom",
                fontsize=canvas.TEXT_SIZE,
                fontweight="bold",
                parse_math=False,
                bbox={"facecolor": canvas.colour("paper"), "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
            )

    def describe(self) -> str:
        """As `StackedArea.describe`, and where the run is."""
        return f"{super().describe()} The run is at {self.x.write(self.now)}."


def mixture_plots(
    changes: Sequence[Change], uses: Sequence[SourceUse], now: float, total: float
) -> list[Plot]:
    """The mixture over the run, and epochs by source.

    Args:
        changes: By rising `tokens`, the first from 0 on.
        uses: Of every source.
        now: Tokens that the run has consumed.
        total: And will have at its end.
    """
    colours = assign(use.name for use in uses)
    used = [use for use in uses if use.planned or use.gave]
    edges = np.array([*(change.tokens for change in changes), total])
    plots: list[Plot] = [
        MixtureOverRun(
            title="Mixture over the run",
            note="line: now; pale: planned" + ("; numbers: changes" if any(c.who for c in changes) else ""),
            x=TOKENS,
            edges=edges,
            bands=[
                (use.name, colours[use.name], np.array([c.shares.get(use.name, 0.0) for c in changes]))
                for use in used
            ],
            stages=_stages(changes, total),
            now=now,
            marks=[change.tokens for change in changes if change.who],
        )
    ]
    if bars := [use for use in used if use.has]:
        plots.append(
            Bars(
                title="Epochs of each source at the end",
                value=Axis("epochs", "passes through the source", zero=True),
                bars=[
                    Bar(use.name, use.planned / use.has, colours[use.name], reference=use.gave / use.has)
                    for use in bars
                ],
                note="mark: now",
                write=lambda value: f"{value:.2f}",
            )
        )
    return plots


def mixture_png(
    title: str, changes: Sequence[Change], uses: Sequence[SourceUse], now: float, total: float
) -> bytes:
    """The plots as one picture."""
    return grid_png(mixture_plots(changes, uses, now, total), columns=1, heading=title)


def mixture_page(
    title: str, changes: Sequence[Change], uses: Sequence[SourceUse], now: float, total: float
) -> Page:
    """The plots with their tables, and every change with its reason."""
    page = Page(title, f"{quantity(now)} of {quantity(total)} tokens ({percent(now / total)})")
    first, *others = mixture_plots(changes, uses, now, total)
    page.section("Mixture").plot(first)
    rows, numbers = [], iter(range(1, len(changes) + 1))
    for change in changes:
        rows.append(
            [
                str(next(numbers)) if change.who else "",
                f"{change.step:,}",
                quantity(change.tokens),
                change.stage,
                change.who or "the stage",
                "planned" if change.is_planned else "in the journal",
                ", ".join(f"{name} {percent(share)}" for name, share in change.shares.items() if share),
                change.reason,
            ]
        )
    page.table(["", "step", "tokens", "stage", "by", "", "mixture", "reason"], rows)
    page.section("Sources")
    for plot in others:
        page.plot(plot)
    page.table(
        ["source", "domain", "tokens", "gave", "epochs", "left in this epoch", "epochs at the end"],
        [
            [
                use.name,
                use.domain,
                quantity(use.has),
                quantity(use.gave),
                f"{use.gave / use.has:.2f}" if use.has else "",
                quantity(-use.gave % use.has if use.gave else use.has) if use.has else "",
                f"{use.planned / use.has:.2f}" if use.has else "",
            ]
            for use in uses
        ],
    )
    return page


def _stages(changes: Sequence[Change], total: float) -> list[Stage]:
    begins: dict[str, float] = {}
    for change in changes:
        begins.setdefault(change.stage, change.tokens)
    ends = [*list(begins.values())[1:], total]
    return [Stage(name, start, end) for (name, start), end in zip(begins.items(), ends, strict=True)]
