"""A design's page: question, verdict, differences with intervals, curves, what arms differ in, cost, what failed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from megatron_davinci.config.section import shown
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.lab.arm_plots import (
    MOST_MIXTURES,
    curves,
    domain_bars,
    domain_differences,
    ends_of,
    mixtures,
    unit_of,
)
from megatron_davinci.lab.arms import Arm, Run
from megatron_davinci.lab.control import cost_of, differences
from megatron_davinci.lab.design import Design
from megatron_davinci.lab.outcomes import Outcome, folder_of
from megatron_davinci.lab.over_sizes import ArmLaw, OverSizes, law_table, trend_table
from megatron_davinci.lab.size_plots import law_plot, trend_plot
from megatron_davinci.lab.verdict import Comparison, Verdict, as_json, in_words, seeds_in_words
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.colors import assign
from megatron_davinci.report.forest import Forest, Row
from megatron_davinci.report.numbers import NOTHING, duration, quantity, signed
from megatron_davinci.report.page import KeyFigure, Link, Page
from megatron_davinci.report.plots import Plot

OVER_SIZES = (
    "What is beyond the largest size is a prediction that assumes the line or the law to go on; it is a reason to "
    "run another size, and no verdict. Recipes that won at small sizes have lost at large ones."
)


def answer(verdict: Verdict) -> str:
    """The verdict in a line."""
    words = [one.word for one in verdict.deciding]
    if len(words) == 1:
        return in_words(verdict.deciding[0])
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
    return (
        f"{'Each against' if verdict.design.within else 'Against'} {verdict.controls}: "
        + ", ".join(f"{count} {word}" for word, count in counts.items())
        + "."
    )


def write_report(
    folder: Path,
    design: Design,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    verdict: Verdict,
) -> Path:
    """Write `lab.html`, `lab.md`, `runs.csv`, `verdict.json` and `plots/`; of a ladder `sizes.csv` too.

    Args:
        folder: Where to.
        design: The design.
        arms: Its arms.
        runs: Its runs.
        outcomes: One for each run.
        verdict: What follows.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "verdict.json", as_json(verdict))
    write_atomically(folder / "runs.csv", runs_csv(design, runs, outcomes))
    write_atomically(folder / "lab.md", markdown(design, arms, outcomes, verdict))
    page = Page(design.question, _subtitle(design, arms, runs))
    for warning in verdict.warnings:
        page.notice(warning)
    page.figures(_key_figures(verdict))
    page.section("Verdict", "\n\n".join(in_words(one) for one in verdict.deciding))
    plots: list[Plot] = []

    def show(plot: Plot | None, caption: str = "") -> None:
        if plot is not None:
            page.plot(plot, caption)
            plots.append(plot)

    for metric in design.metrics:
        show(
            _forest(verdict, metric.name),
            "Large dot: mean over seeds; small dots: each seed's run less the control's of the same seed; line: 95% "
            "interval by Student's t for pairs, each arm for itself.",
        )
    page.table(
        *_arm_table(design, arms, verdict, runs, outcomes),
        caption="Mean over seeds at the end, ± their standard deviation; the difference from the control in pairs "
        "of one seed, its 95% interval by Student's t, each arm for itself; p-values are corrected by Holm.",
    )
    page.section("How sure", _sure(verdict))
    if verdict.over_sizes is not None:
        page.section("Over sizes", OVER_SIZES)
        show(
            trend_plot(verdict),
            "Mean over pairs; the band is each size's 95% interval; dashed: no difference.",
        )
        page.table(
            *trend_table(verdict.over_sizes),
            caption="The line through all pairs, over the logarithm of size.",
        )
        show(
            law_plot(verdict.over_sizes, design.metrics[0].name), "Points: means over seeds; lines: the laws."
        )
        page.table(*law_table(verdict.over_sizes), caption="L = E + A / N^a (+ B / D^b), with 95% intervals.")
        write_atomically(folder / "sizes.csv", sizes_csv(verdict.over_sizes))
    page.section("On the way")
    sizes, ends = list(dict.fromkeys(arm.size for arm in arms)), ends_of(runs, outcomes)
    for size in sizes:
        show(
            curves(design, runs, outcomes, size),
            "Mean over seeds; from three seeds on a band is its 95% interval. "
            "Arms share their seeds, so a difference may be sure where bands overlap.",
        )
    page.section("By domain")
    for size in sizes:
        show(domain_bars(arms, ends, size), "Mean over seeds, with its 95% interval.")
    show(
        domain_differences(verdict, arms, ends),
        "Held-out loss at the end, arm less control in pairs of one seed; line: 95% interval.",
    )
    page.section("Mixtures", "What arms are trained on; those that are trained on the same have one picture.")
    pictures = mixtures(arms)
    for plot in pictures[:MOST_MIXTURES]:
        show(plot)
    if len(pictures) > MOST_MIXTURES:
        page.table(["not drawn"], [[plot.title] for plot in pictures[MOST_MIXTURES:]])
    page.section("What the arms differ in")
    page.table(
        *_difference_table(arms), caption="Every key that arms do not share a value of; nothing else differs."
    )
    page.section("Cost")
    shared = (
        "A shared past was trained once for each seed, and is in the tokens, FLOPs and time of every arm."
    )
    page.table(*_cost_table(arms, runs, outcomes), caption=shared if design.branch else "")
    failed = [one for one in outcomes if one.state == "failed"]
    if failed:
        page.section("What failed")
        for one in failed:
            page.text_block(one.why, label=one.run.label)
    stopped = [one for one in outcomes if one.state == "stopped"]
    if stopped:
        page.section(
            "What was stopped early", "The design allows it; what was stopped has no value at its end."
        )
        page.table(
            ["run", "steps", "why"],
            [[one.run.label, f"{one.step} of {one.steps}", one.why] for one in stopped],
        )
    page.section("Runs", collapsed=True)
    rows = [
        [one.run.label, one.state, f"{one.step} of {one.steps}", _to_run(folder, one.run)] for one in outcomes
    ]
    page.table(["run", "state", "steps", "directory (runs/…)"], rows)
    for plot in plots:
        name = "".join(c if c.isalnum() else "-" for c in plot.title.lower()).strip("-")
        write_atomically(folder / "plots" / f"{name}.png", plot.png())
    return page.write(folder / "lab.html")


def _subtitle(design: Design, arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    names = len(dict.fromkeys(arm.name for arm in arms))
    sizes = f", {len(design.ladder)} sizes" if design.ladder else ""
    tokens = quantity(cost_of(arms[0].config).tokens)
    return f"{names} arms{sizes}, {len(design.seeds)} seeds, {len(runs)} runs, {tokens} tokens a run"


def _key_figures(verdict: Verdict) -> list[KeyFigure]:
    found = [
        KeyFigure("Verdict", one.word, f"{one.arm}{f' at {one.size}' if one.size else ''}")
        for one in verdict.deciding[:3]
    ]
    metric = verdict.design.metrics[0]
    noise = NOTHING if verdict.noise is None else f"{verdict.noise:.4f}"
    power = NOTHING if verdict.power is None else f"{100 * verdict.power:.0f}%"
    count = len(verdict.deciding)
    corrected = f", corrected for {count} comparisons" if count > 1 else ""
    return [
        *found,
        KeyFigure("Noise of a pair", noise, f"{metric.name}, one standard deviation"),
        KeyFigure("Power", power, f"for a difference of {metric.margin:g}{corrected}"),
    ]


def _sure(verdict: Verdict) -> str:
    metric, count = verdict.design.metrics[0], len(verdict.deciding)
    said = [
        f"A difference counts when its p-value, by a paired t-test over seeds"
        f"{f' corrected for {count} comparisons by Holm' if count > 1 else ''}, is below {verdict.design.alpha:g}; "
        f"two arms are equivalent when two one-sided tests exclude a difference of {metric.margin:g} or more."
    ]
    if verdict.noise is not None:
        said.append(f"Noise of a pair: {verdict.noise:.4f}. {seeds_in_words(verdict)}")
    return "\n\n".join(said)


def _forest(verdict: Verdict, metric: str) -> Forest | None:
    there = [one for one in verdict.by(metric) if one.found is not None]
    if not there:
        return None
    colours = assign(one.arm for one in there)
    rows = [_row(one, colours[one.arm]) for one in there]
    lower = there[0].metric.better == "lower"
    return Forest(
        title=f"{metric}, less that of {verdict.controls}",
        axis=Axis(metric, unit_of(metric)),
        rows=rows,
        write=signed,
        better="better" if lower else "worse",
        worse="worse" if lower else "better",
        note=f"a difference of {there[0].metric.margin:g} matters",
    )


def _row(one: Comparison, colour: str) -> Row:
    found = one.found
    assert found is not None
    known = found.pairs > 1
    name = f"{one.arm} at {one.size}" if one.size else one.arm
    return Row(
        name=name,
        value=found.mean,
        low=found.low if known else None,
        high=found.high if known else None,
        dots=list(found.each.values()),
        colour=colour,
        words=one.word,
    )


def _to_run(folder: Path, run: Run) -> Link | str:
    """A link to a run's page, or else to its directory; its name alone where there is neither."""
    root = folder.parent.parent
    there = folder_of(root, run)
    if not there.is_dir():
        return run.identity
    page = "report.html" if (there / "report.html").is_file() else ""
    return Link(run.identity, f"../../{there.relative_to(root).as_posix()}/{page}")


def _difference_table(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    first = [arm for arm in arms if arm.size == arms[0].size]
    names = [arm.name for arm in first]
    rows = [[key, *(shown(values[name]) for name in names)] for key, values in differences(first).items()]
    return ["key", *names], rows


def _arm_table(
    design: Design, arms: Sequence[Arm], verdict: Verdict, runs: Sequence[Run], outcomes: Sequence[Outcome]
) -> tuple[list[str], list[list[str]]]:
    """Each arm by each metric: its mean, and against the control the difference, its interval and the verdict."""
    compared = {(one.metric.name, one.size, one.arm): one for one in verdict.comparisons}
    rows = []
    for metric in design.metrics:
        for arm in arms:
            values = [
                value
                for run, one in zip(runs, outcomes, strict=True)
                if run.arm is arm and (value := one.metric(metric.name)) is not None
            ]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            mean = f"{np.mean(values):.4f}{spread}" if values else NOTHING
            name = f"{arm.name} at {arm.size}" if arm.size else arm.name
            row = [name, metric.name, str(len(values)), mean]
            against = compared.get((metric.name, arm.size, arm.name))
            rows.append([*row, *(["", "", "", "control"] if against is None else _against(against))])
    return ["arm", "metric", "seeds", "mean", "less control", "95% interval", "p", "verdict"], rows


def _against(one: Comparison) -> list[str]:
    found = one.found
    if found is None:
        return [NOTHING, NOTHING, NOTHING, one.word]
    known = found.pairs > 1
    interval = f"{signed(found.low)} to {signed(found.high)}" if known else NOTHING
    return [signed(found.mean), interval, NOTHING if one.word == "refused" else f"{one.p:.3g}", one.word]


def _cost_table(
    arms: Sequence[Arm], runs: Sequence[Run], outcomes: Sequence[Outcome]
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm in arms:
        cost = cost_of(arm.config)
        took = sum(one.seconds for run, one in zip(runs, outcomes, strict=True) if run.arm is arm)
        name = f"{arm.name} at {arm.size}" if arm.size else arm.name
        rows.append([name, quantity(cost.tokens), quantity(cost.flops), duration(took)])
    return ["arm", "tokens a run", "FLOPs a run", "time of all its steps"], rows


def runs_csv(design: Design, runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    """A line for each run: arm, size, seed, state, metrics."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "size", "seed", "state", "identity", *(metric.name for metric in design.metrics)])
    for run, one in zip(runs, outcomes, strict=True):
        values: list[Any] = [one.metric(metric.name) for metric in design.metrics]
        row = ["" if value is None else f"{value:.6f}" for value in values]
        writer.writerow([run.arm.name, run.arm.size, run.seed, one.state, run.identity, *row])
    return out.getvalue()


def markdown(design: Design, arms: Sequence[Arm], outcomes: Sequence[Outcome], verdict: Verdict) -> str:
    """The same in Markdown, for a lab book or a pull request."""
    said = [f"# {design.question}", "", f"**{answer(verdict)}**", ""]
    said += [f"- {warning}" for warning in verdict.warnings] + ([""] if verdict.warnings else [])
    said += ["| arm | metric | difference | 95% interval | seeds | verdict |", "|---|---|---|---|---|---|"]
    for one in verdict.comparisons:
        found = one.found
        name = f"{one.arm} at {one.size}" if one.size else one.arm
        interval = f"{signed(found.low)} to {signed(found.high)}" if found and found.pairs > 1 else NOTHING
        mean, pairs = (signed(found.mean), found.pairs) if found else (NOTHING, 0)
        said.append(f"| {name} | {one.metric.name} | {mean} | {interval} | {pairs} | {one.word} |")
    if verdict.over_sizes is not None:
        said += _markdown_table("How the difference changes over sizes:", *trend_table(verdict.over_sizes))
        said += _markdown_table("Scaling laws, L = E + A / N^a (+ B / D^b):", *law_table(verdict.over_sizes))
    said += _markdown_table("What the arms differ in:", *_difference_table(arms))
    for ended in outcomes:
        if ended.state == "failed":
            said += [
                "",
                f"{ended.run.label} failed:",
                "",
                *(f"    {line}" for line in ended.why.splitlines()),
            ]
    said += ["", _sure(verdict).replace("\n\n", " "), ""]
    return "\n".join(said)


def _markdown_table(head: str, headers: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["", head, "", "| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def sizes_csv(found: OverSizes) -> str:
    """A line for each arm: its trend and its law, with the ends of their 95% intervals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["arm", "slope", "slope_low", "slope_high", "crossing", "floor", "floor_low", "floor_high", "exponent",
         "exponent_low", "exponent_high", "no_law"]
    )  # fmt: skip
    for one in found.laws or [ArmLaw(arm, None, "another metric", [], [], 0.0) for arm in found.trends]:
        line = found.trends.get(one.arm)
        trend: list[float | None] = [] if line is None else [line.slope, line.low, line.high, line.crossing]
        law = [] if one.law is None else [
            end
            for each in (one.law.interval("floor"), one.law.interval("exponent"))
            for end in (each.value, each.low, each.high)
        ]  # fmt: skip
        cells: list[float | None] = [*(trend or [None] * 4), *law] + [None] * (6 - len(law))
        writer.writerow([one.arm, *("" if cell is None else f"{cell:.6g}" for cell in cells), one.why])
    return out.getvalue()


def write_index(root: Path) -> Path:
    """Write `index.html`: all designs of a lab with their verdicts, whatever they are."""
    rows = []
    for path in sorted(root.glob("designs/*/verdict.json")):
        said = json.loads(path.read_text(encoding="utf-8"))
        words = [
            one["verdict"] for one in said["comparisons"] if one["metric"] == said["comparisons"][0]["metric"]
        ]
        counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        rows.append(
            [
                Link(said["question"], f"designs/{quote(path.parent.name)}/lab.html"),
                counted if len(words) > 1 else words[0],
                len(said["seeds"]),
                path.parent.name,
            ]
        )
    page = Page("Questions and verdicts", f"{len(rows)} designs")
    page.section("Designs")
    page.table(["question", "verdict", "seeds", "design"], rows)
    return page.write(root / "index.html")
