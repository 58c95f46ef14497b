"""The schedule of a planned run, drawn: learning rate and batch, and the mixture under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_davinci.report.axes import Axis, Stage
from megatron_davinci.report.colors import assign
from megatron_davinci.report.page import Page
from megatron_davinci.report.plots import LinePlot, Plot, Series, StackedArea, grid_png

TOKENS = Axis("tokens consumed", "tokens", zero=True)


@dataclass(frozen=True)
class Curves:
    """What is drawn of a schedule, over the tokens that the run has consumed.

    Attributes:
        tokens: Where steps begin, rising; stages and batches begin among them.
        learning_rate: Of those steps.
        batch: Sequences in those steps.
        edges: Where stages begin, and where the last ends.
        stages: Their names.
        shares: By domain, the share of each stage.
    """

    tokens: Sequence[float]
    learning_rate: Sequence[float]
    batch: Sequence[float]
    edges: Sequence[float]
    stages: Sequence[str]
    shares: Mapping[str, Sequence[float]]


def schedule_plots(curves: Curves) -> list[Plot]:
    """Learning rate, batch size and mixture, one above the other."""
    ranges = [
        Stage(name, start, end)
        for name, start, end in zip(curves.stages, curves.edges[:-1], curves.edges[1:], strict=True)
    ]
    colours = assign(curves.shares)
    return [
        LinePlot(
            title="Learning rate",
            x=TOKENS,
            y=Axis("learning rate", "", zero=True),
            series=[Series(name="", x=curves.tokens, y=curves.learning_rate)],
            stages=ranges,
            steps=True,
        ),
        LinePlot(
            title="Batch size",
            x=TOKENS,
            y=Axis("global batch size", "sequences", zero=True),
            series=[Series(name="", x=curves.tokens, y=curves.batch)],
            stages=ranges,
            steps=True,
        ),
        StackedArea(
            title="Mixture",
            x=TOKENS,
            edges=curves.edges,
            bands=[(name, colours[name], shares) for name, shares in curves.shares.items()],
            stages=ranges,
        ),
    ]


def schedule_png(curves: Curves, heading: str) -> bytes:
    """The three plots in one picture."""
    return grid_png(schedule_plots(curves), columns=1, heading=heading)


def schedule_page(
    curves: Curves, title: str, figures: Sequence[tuple[str, ...]], warnings: Sequence[str]
) -> Page:
    """A page with the three plots, their data as tables, and what to know before the run starts."""
    page = Page(title, "What the configuration plans; nothing has run.")
    page.figures(list(figures))
    captions = (
        "Of each step. The last step of a stage is the one that arrives at its end.",
        "Sequences in each step.",
        "The share of each domain in the tokens of each stage.",
    )
    page.section("Schedule")
    for plot, caption in zip(schedule_plots(curves), captions, strict=True):
        page.plot(plot, caption)
    if warnings:
        page.section("To know before it starts", "\n\n".join(warnings))
    return page
