"""The study's page: the answer first, then the figures, what each arm drew, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conclude import Comparison, answer, conclusion, nats, reasons
from figures import Difference, Outcome, difference, mean_goal

from megatron_davinci.files import write_atomically
from megatron_davinci.report.axes import Axis, Stage
from megatron_davinci.report.colors import assign
from megatron_davinci.report.forest import Forest, Row
from megatron_davinci.report.numbers import NOTHING, percent, quantity
from megatron_davinci.report.page import KeyFigure, Page
from megatron_davinci.report.plots import LinePlot, Plot, Series, StackedArea, grid_png

TOKENS = Axis("tokens", "tokens", zero=True)
LESS = Axis("mean held-out loss, less that of the best fixed mixture", "nats per token")
COLOURS = {"controller": "vermillion", "random": "slate", "amounts": "sand", "fixed": "blue", "grid": "green"}


def write_page(comparison: Comparison, folder: Path, subtitle: str, missing: str = "") -> Path:
    """Write `study.html`, `study.png` and `plots/*.png`.

    Args:
        comparison: What is shown.
        folder: Where to.
        subtitle: Model, tokens, seeds, on one line.
        missing: What is not there yet; empty if nothing.

    Returns:
        The page.
    """
    page = Page("Does the controller beat a fixed mixture?", subtitle)
    if missing:
        page.notice(missing)
    page.figures(key_figures(comparison))
    first, goal, words = arms_plot(comparison), progress_plot(comparison), conclusion(comparison)
    page.section("The answer", "\n\n".join(words))
    page.plot(
        first,
        f"Each arm against {comparison.best_fixed}, the best of the three fixed mixtures. Large dot: mean; "
        "small dots: each seed less the same seed's; line: 95% interval by Student's t for paired values, each arm "
        "for itself; arrows: beyond the edge.",
    )
    page.section("Why", "\n\n".join(reasons(comparison)))
    page.plot(domains_plot(comparison), "The same differences for each domain by itself.")
    page.section("What each arm drew")
    mixtures = mixture_plots(comparison)
    for plot in mixtures:
        page.plot(plot)
    page.section("On the way")
    page.plot(
        goal, "The goal over the run, mean over seeds. The learning rate falls at the end of every arm."
    )
    curves = domain_curves(comparison)
    page.plot(curves)
    page.section("Figures")
    page.table(*loss_table(comparison), caption="Held-out loss at the end, nats per token, mean over seeds.")
    if all(one.bits for found in comparison.arms.values() for one in found.values()):
        page.table(*bits_table(comparison), caption="The same in bits per byte.")
    page.table(*share_table(comparison), caption="Share of all tokens, mean over seeds.")
    page.section("The oracle's grid", grid_words(comparison))
    page.plot(grid_plot(comparison))
    plots: list[Plot] = [
        first, domains_plot(comparison), goal, curves, grid_plot(comparison), *mixtures
    ]  # fmt: skip
    for plot in plots:
        name = "".join(c if c.isalnum() else "-" for c in plot.title.lower())
        write_atomically(folder / "plots" / f"{name}.png", plot.png())
    write_atomically(folder / "study.png", grid_png([first], columns=1, heading=answer(comparison)))
    return page.write(folder / "study.html")


def key_figures(comparison: Comparison) -> list[KeyFigure]:
    """The goal of the arms that matter, with the seeds' spread."""
    names = [
        ("Controller", "controller"),
        (f"Best fixed ({comparison.best_fixed})", comparison.best_fixed),
        *(("Random", name) for name in comparison.of_kind("random")),
        (f"Oracle ({comparison.oracle})", comparison.oracle),
    ]
    found = []
    for label, name in names:
        spread = comparison.spread(name)
        seeds = len(comparison.arms[name])
        note = "one seed" if spread is None else f"± {spread:.4f} over {seeds} seeds"
        colour = COLOURS[comparison.kinds[name]] if label.split()[0] != "Oracle" else "green"
        found.append(KeyFigure(label, f"{mean_goal(comparison.arms[name]):.4f}", note, colour))
    return found


def _row(comparison: Comparison, name: str, found: Difference, words: str = "") -> Row:
    known = len(found.each) > 1
    seeds = list(found.each.values())
    return Row(
        name=name,
        value=found.mean,
        low=found.low if known and name != comparison.best_fixed else None,
        high=found.high if known and name != comparison.best_fixed else None,
        dots=seeds if name != comparison.best_fixed else (),
        colour="green" if name == comparison.oracle else COLOURS[comparison.kinds[name]],
        words=words,
    )


def arms_plot(comparison: Comparison) -> Forest:
    """The main arms against the best fixed mixture, the best on top."""
    names = [name for name, kind in comparison.kinds.items() if kind != "grid"]
    if comparison.oracle not in names:
        names.append(comparison.oracle)
    names.sort(key=lambda name: comparison.against_fixed[name].mean)
    rows = []
    for name in names:
        words = comparison.words[name]
        if name == comparison.oracle:
            words = f"oracle: {words}"
        rows.append(_row(comparison, name, comparison.against_fixed[name], words))
    return Forest(
        title="Arms against the best fixed mixture",
        axis=LESS,
        rows=rows,
        write=nats,
        limits=limits_of([row for row in rows if row.colour != COLOURS["fixed"]]),
    )


def limits_of(rows: Sequence[Row]) -> tuple[float, float]:
    """The range of the rows that are asked about: one bad mixture must not press all others into a line."""
    marks = [0.0, *(v for row in rows for v in (row.low, row.high, row.value, *row.dots) if v is not None)]
    low, high = min(marks), max(marks)
    room = 0.25 * ((high - low) or 1.0)
    return low - room, high + room


def grid_plot(comparison: Comparison) -> Forest:
    """Every fixed mixture and schedule that was tried, the best on top."""
    names = [*comparison.of_kind("fixed"), *comparison.of_kind("grid")]
    names.sort(key=lambda name: comparison.against_fixed[name].mean)
    rows = [_row(comparison, name, comparison.against_fixed[name], comparison.words[name]) for name in names]
    single = [row for row in rows if row.colour != COLOURS["fixed"]]
    return Forest(
        title="Fixed mixtures and schedules",
        axis=LESS,
        rows=rows,
        write=nats,
        limits=limits_of(single) if single else None,
    )


def domains_plot(comparison: Comparison) -> Forest:
    """The controller against the best fixed mixture, by domain."""
    ours, theirs = comparison.arms["controller"], comparison.arms[comparison.best_fixed]
    colours, rows = assign(comparison.domains), []
    for domain in comparison.domains:
        found = difference(
            {seed: float(one.losses[domain][-1]) for seed, one in ours.items()},
            {seed: float(one.losses[domain][-1]) for seed, one in theirs.items()},
        )
        known = len(found.each) > 1
        shares = [float(np.mean([one.drawn[domain] for one in arm.values()])) for arm in (ours, theirs)]
        rows.append(
            Row(
                domain,
                found.mean,
                found.low if known else None,
                found.high if known else None,
                list(found.each.values()),
                colours[domain],
                f"{percent(shares[0], 2)} of its tokens, {percent(shares[1], 2)} there",
            )
        )
    return Forest(
        title=f"The controller against {comparison.best_fixed}, by domain",
        axis=Axis(f"held-out loss of the controller, less that of {comparison.best_fixed}", "nats per token"),
        rows=rows,
        write=nats,
    )


def mixture_plots(comparison: Comparison) -> list[Plot]:
    """Shares over tokens: each seed of the controller beside the random arm of the same seed."""
    plots: list[Plot] = []
    for seed in comparison.seeds:
        for kind in ("controller", "random"):
            for name in comparison.of_kind(kind):
                if seed in comparison.arms[name]:
                    plots.append(mixture_plot(f"{name}, seed {seed}", comparison.arms[name][seed]))
    return plots


def mixture_plot(title: str, one: Outcome) -> StackedArea:
    """What one run drew."""
    colours = assign(one.shares)
    return StackedArea(
        title=title,
        half=True,
        x=TOKENS,
        edges=one.edges,
        bands=[(domain, colours[domain], shares) for domain, shares in one.shares.items()],
        stages=_stages(one),
    )


def progress_plot(comparison: Comparison) -> LinePlot:
    """The goal at each evaluation, less that of the best fixed mixture's at the same tokens."""
    names = [name for name, kind in comparison.kinds.items() if kind in ("controller", "random", "fixed")]
    if comparison.oracle not in names:
        names.append(comparison.oracle)
    reference = comparison.arms[comparison.best_fixed]
    series = []
    for name in names:
        found = comparison.arms[name]
        shared = sorted(set(found) & set(reference))
        gap = np.mean([found[seed].goals - reference[seed].goals for seed in shared], axis=0)
        colour = "green" if name == comparison.oracle else COLOURS[comparison.kinds[name]]
        series.append(Series(name=name, x=found[shared[0]].tokens, y=gap, colour=colour))
    return LinePlot(
        title="Over the run, against the best fixed mixture",
        x=TOKENS,
        y=LESS,
        series=series,
        stages=_stages(next(iter(reference.values()))),
        skip_start=0.1,
    )


def domain_curves(comparison: Comparison) -> LinePlot:
    """Held-out loss by domain of the controller's first seed."""
    seed = comparison.seeds[0]
    one = comparison.arms["controller"][seed]
    colours = assign(one.losses)
    return LinePlot(
        title=f"Held-out loss by domain: controller, seed {seed}",
        x=TOKENS,
        y=Axis("held-out loss", "nats per token"),
        series=[
            Series(name=domain, x=one.tokens, y=curve, colour=colours[domain])
            for domain, curve in one.losses.items()
        ],
        stages=_stages(one),
        skip_start=0.05,
    )


def _stages(one: Outcome) -> list[Stage]:
    config = one.run.config()
    ends = np.cumsum([stage.tokens for stage in config.curriculum]).astype(float)
    starts = [0.0, *ends[:-1].tolist()]
    return [
        Stage(stage.name, start, min(end, float(one.edges[-1])))
        for stage, start, end in zip(config.curriculum, starts, ends.tolist(), strict=True)
    ]


def loss_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Arms by domains."""
    rows = []
    for name, found in comparison.arms.items():
        spread = comparison.spread(name)
        rows.append(
            [
                name,
                str(len(found)),
                *(f"{comparison.loss(name, domain):.3f}" for domain in comparison.domains),
                f"{mean_goal(found):.4f}",
                NOTHING if spread is None else f"{spread:.4f}",
            ]
        )
    return ["arm", "seeds", *comparison.domains, "mean", "± over seeds"], rows


def bits_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Arms by domains, bits a byte."""
    rows = []
    for name, found in comparison.arms.items():
        bits = {
            domain: float(np.mean([one.bits[domain] for one in found.values()]))
            for domain in comparison.domains
        }
        rows.append(
            [name, *(f"{value:.3f}" for value in bits.values()), f"{np.mean(list(bits.values())):.4f}"]
        )
    return ["arm", *comparison.domains, "mean"], rows


def share_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Arms by domains, of all tokens."""
    rows = [
        [
            name,
            *(
                percent(float(np.mean([one.drawn[domain] for one in found.values()])), 3)
                for domain in comparison.domains
            ),
        ]
        for name, found in comparison.arms.items()
    ]
    return ["arm", *comparison.domains], rows


def grid_words(comparison: Comparison) -> str:
    """How the oracle was chosen."""
    names = [*comparison.of_kind("fixed"), *comparison.of_kind("grid")]
    once = [name for name in names if len(comparison.arms[name]) < len(comparison.seeds)]
    text = (
        f"The oracle is the best of {len(names)} fixed mixtures and schedules, chosen by their results, which "
        "no run could have known."
    )
    if once:
        text += (
            f" {len(once)} of them ran with the first seed only; the best by it was given all "
            f"{len(comparison.seeds)} seeds, and so was the mixture that doubles every domain whose "
            "doubling alone helped. The oracle is the best of those with all seeds."
        )
    return text


def subtitle_of(comparison: Comparison, parameters: int) -> str:
    """Model, tokens, seeds."""
    one = next(iter(comparison.arms["controller"].values()))
    runs = sum(len(found) for found in comparison.arms.values())
    return (
        f"{quantity(parameters)} parameters, {quantity(one.edges[-1])} tokens a run, {len(comparison.domains)} "
        f"domains of real text, {len(comparison.seeds)} seed{'' if len(comparison.seeds) == 1 else 's'}, {runs} runs"
    )
