"""The pictures of arms: losses on the way with bands, each domain at the end, and what each arm was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_davinci.config.mixture import exact_share, share_text
from megatron_davinci.lab.arms import Arm, Run
from megatron_davinci.lab.design import Design
from megatron_davinci.lab.outcomes import TASK, Outcome
from megatron_davinci.lab.verdict import Verdict
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.report.axes import Axis, Stage
from megatron_davinci.report.colors import assign
from megatron_davinci.report.forest import Forest, Row
from megatron_davinci.report.grouped import Group, GroupedBars
from megatron_davinci.report.numbers import signed
from megatron_davinci.report.plots import Bar, LinePlot, Plot, Series, StackedArea
from megatron_davinci.stats.comparison import half_width, paired

TOKENS = Axis("tokens", "tokens", zero=True)
MOST_MIXTURES = 12
LEAST_FOR_A_BAND = (
    3  # runs: the interval of two is nine deviations wide to either side, and would hide all else
)
_MOST_BARS = 60
_MOST_ROWS = 40
Ends = Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]]


def unit_of(metric: str) -> str:
    """What a metric's values are in."""
    if metric.startswith(TASK):
        return "score"
    return "nats per token" if metric.startswith(("heldout_loss", "train")) else "bits per byte"


def curves(design: Design, runs: Sequence[Run], outcomes: Sequence[Outcome], size: str) -> LinePlot | None:
    """The first metric that is measured on the way, at one size: means over seeds with 95% intervals as bands."""
    metric = next((one.name for one in design.metrics if not one.name.startswith(TASK)), "heldout_loss.mean")
    by_arm: dict[str, list[tuple[list[float], list[float]]]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        curve = outcome.curve(metric)
        if run.arm.size == size and len(curve[0]) > 1:
            by_arm.setdefault(run.arm.name, []).append(curve)
    if not by_arm:
        return None
    colours, series = assign(by_arm), []
    for name, each in by_arm.items():
        shortest = min(len(tokens) for tokens, _ in each)
        values = np.array([losses[:shortest] for _, losses in each])
        band = None
        if len(values) >= LEAST_FOR_A_BAND:
            band = [half_width(float(one), len(values)) for one in values.std(axis=0, ddof=1)]
        x, y = each[0][0][:shortest], values.mean(axis=0)
        series.append(Series(name=name, x=x, y=y, band=band, colour=colours[name]))
    title = f"{metric} over the run{f' at {size}' if size else ''}"
    return LinePlot(title=title, x=TOKENS, y=Axis(metric, unit_of(metric)), series=series, skip_start=0.1)


def ends_of(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> Ends:
    """Held-out losses by domain at the end of every run that is done: `{(size, arm): {seed: {domain: loss}}}`.

    A run that has diverged is left out: there is no mean over it.
    """
    found: dict[tuple[str, str], dict[int, Mapping[str, float]]] = {}
    for run, one in zip(runs, outcomes, strict=True):
        if one.state != "done" or not one.evaluations:
            continue
        if all(map(math.isfinite, one.evaluations[-1]["heldout_loss"].values())):
            found.setdefault((run.arm.size, run.arm.name), {})[run.seed] = one.evaluations[-1]["heldout_loss"]
    return found


def domain_bars(arms: Sequence[Arm], ends: Ends, size: str) -> GroupedBars | None:
    """Held-out loss of every domain at the end, one bar an arm, with the 95% interval of its mean over seeds."""
    there = [arm for arm in arms if arm.size == size and ends.get((size, arm.name))]
    if not there:
        return None
    domains = list(next(iter(ends[size, there[0].name].values())))
    if len(domains) * len(there) > _MOST_BARS:
        return None
    colours = assign(arm.name for arm in there)

    def bar(arm: Arm, domain: str) -> Bar:
        values = np.array([each[domain] for each in ends[size, arm.name].values()])
        mean = float(values.mean())
        half = half_width(float(values.std(ddof=1)), len(values)) if len(values) > 1 else None
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Bar(arm.name, mean, colours[arm.name], low, high)

    return GroupedBars(
        title=f"Domains at the end{f' at {size}' if size else ''}",
        value=Axis("held-out loss", "nats per token", zero=True),
        groups=[Group(domain, [bar(arm, domain) for arm in there]) for domain in domains],
        note="less is better",
    )


def domain_differences(verdict: Verdict, arms: Sequence[Arm], ends: Ends) -> Forest | None:
    """Held-out loss of every domain at the end, arm less control, in pairs of one seed."""
    rows = []
    for arm in arms:
        ours, theirs = ends.get((arm.size, arm.name), {}), ends.get((arm.size, arm.against), {})
        shared = set(ours) & set(theirs)
        if not arm.against or not shared:
            continue
        domains = list(next(iter(ours.values())))
        colours = assign(domains)
        for domain in domains:
            found = paired({s: ours[s][domain] for s in shared}, {s: theirs[s][domain] for s in shared})
            known = found.pairs > 1
            name = domain if len(verdict.deciding) == 1 else f"{domain}: {arm.name} {arm.size}".rstrip()
            rows.append(
                Row(name, found.mean, found.low if known else None, found.high if known else None,
                    list(found.each.values()), colours[domain])
            )  # fmt: skip
    if not rows or len(rows) > _MOST_ROWS:
        return None
    return Forest(
        title=f"By domain, less {verdict.controls}",
        axis=Axis("held-out loss", "nats per token"),
        rows=rows,
        write=signed,
    )


def mixtures(arms: Sequence[Arm]) -> list[Plot]:
    """What each arm is trained on over its run; arms that are trained on the same have one picture."""
    alike: dict[tuple[tuple[str, int, tuple[tuple[str, float], ...]], ...], list[Arm]] = {}
    for arm in arms:
        schedule = Schedule(arm.config.curriculum, arm.config.data.sequence_length)
        drawn = []
        for number, stage in enumerate(arm.config.curriculum):
            segments = schedule.stage_segments(number)
            if segments:
                shares = {
                    name: float(exact_share(name, share_text(one))) for name, one in stage.mixture.items()
                }
                end = segments[-1].end_sample * arm.config.data.sequence_length
                drawn.append((stage.name, end, tuple(shares.items())))
        alike.setdefault(tuple(drawn), []).append(arm)
    names = dict.fromkeys(
        name for stages in alike for _, _, shares in stages for name, share in shares if share
    )
    colours = assign(names)
    plots: list[Plot] = []
    for stages, same in alike.items():
        edges = [0.0, *(float(end) for _, end, _ in stages)]
        bands = [
            (name, colours[name], np.array([dict(shares).get(name, 0.0) for _, _, shares in stages]))
            for name in names
        ]
        plots.append(
            StackedArea(
                title=_title(same, len(alike)),
                half=len(alike) > 1,
                x=TOKENS,
                edges=edges,
                bands=bands,
                stages=[
                    Stage(stage, start, end)
                    for (stage, _, _), start, end in zip(stages, edges, edges[1:], strict=False)
                ],
            )
        )
    return plots


def _title(arms: Sequence[Arm], pictures: int) -> str:
    if pictures == 1:
        return "Mixture of all arms"
    said = [f"{arm.name} at {arm.size}" if arm.size else arm.name for arm in arms]
    return "Mixture: " + ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")
