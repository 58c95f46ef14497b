"""What a ladder tells beyond its sizes: each arm's scaling law, how an effect changes with size, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_davinci.errors import DataError
from megatron_davinci.lab.arms import Arm, Run
from megatron_davinci.lab.control import cost_of
from megatron_davinci.lab.outcomes import Outcome
from megatron_davinci.report.numbers import with_minus
from megatron_davinci.stats.comparison import Paired
from megatron_davinci.stats.crossover import REACH, Trend, trend
from megatron_davinci.stats.scaling import ScalingLaw, fit_scaling_law

AHEAD = 10.0
"""How far beyond the largest size a law's prediction is shown."""


@dataclass(frozen=True)
class ArmLaw:
    """An arm's law.

    Attributes:
        arm: Its name.
        law: The law; None where it was refused.
        why: Why it was.
        sizes: [n] parameters of each run that it was fitted to.
        losses: [n] at their ends.
        tokens: That runs of the ladder's largest size are trained on, whether or not they came to their end.
    """

    arm: str
    law: ScalingLaw | None
    why: str
    sizes: list[float]
    losses: list[float]
    tokens: float


@dataclass(frozen=True)
class OverSizes:
    """What a ladder tells.

    Attributes:
        scale: What sizes are counted in: `parameters` (without embeddings), or `tokens` where models are of one size.
        laws: Of each arm, by the metric that decides.
        trends: By arm: how its difference from the control changes.
        warnings: In words.
        sizes: Of each step of the ladder, in the control.
    """

    scale: str
    laws: list[ArmLaw] = field(default_factory=list)
    trends: dict[str, Trend] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)

    @property
    def ahead(self) -> float:
        """The size that all laws are drawn on to: one, so that arms can be compared, also where runs are missing."""
        return AHEAD * max(self.sizes.values())


def over_sizes(
    arms: Sequence[Arm],
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    metric: str,
    found: Mapping[tuple[str, str], Paired],
    alpha: float,
) -> OverSizes | None:
    """Look over the sizes of a ladder.

    Args:
        arms: All, the control first.
        runs: Of the design.
        outcomes: One for each.
        metric: That decides.
        found: Differences from the control by arm and size.
        alpha: Chance of a false warning, over all arms.

    Returns:
        None where the ladder's steps differ in neither parameters nor tokens.
    """
    control = arms[0].name
    counted = {
        (arm.name, arm.size): {
            "parameters": float(arm.config.model.parameters(embeddings=False, active=True)),
            "tokens": float(cost_of(arm.config).tokens),
        }
        for arm in arms
    }
    sizes = list(dict.fromkeys(arm.size for arm in arms))
    scale = next(
        (name for name in ("parameters", "tokens") if len({counted[control, s][name] for s in sizes}) > 1),
        None,
    )
    if scale is None:
        return None
    others = [name for name in dict.fromkeys(arm.name for arm in arms) if name != control]
    trends: dict[str, Trend] = {}
    for name in others:
        by_size: dict[float, list[float]] = {}
        for size in sizes:
            if (name, size) in found:
                # Two steps of a ladder may have one size: models of as many parameters, and more tokens.
                by_size.setdefault(counted[control, size][scale], []).extend(found[name, size].each.values())
        if (line := trend(by_size, confidence=1 - alpha / len(others))) is not None:
            trends[name] = line
    laws = []
    if metric.startswith(("heldout_loss", "train_loss")):
        laws = [_law(name, metric, runs, outcomes, counted, scale) for name in (control, *others)]
    said = [words for name, line in trends.items() if (words := _warning(name, line, scale))]
    return OverSizes(scale, laws, trends, said, {size: counted[control, size][scale] for size in sizes})


def _law(
    arm: str,
    metric: str,
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    counted: Mapping[tuple[str, str], Mapping[str, float]],
    scale: str,
) -> ArmLaw:
    n, d, y = [], [], []
    for run, one in zip(runs, outcomes, strict=True):
        value = one.metric(metric)
        if run.arm.name == arm and value is not None:
            n.append(counted[arm, run.arm.size][scale])
            d.append(counted[arm, run.arm.size]["tokens"])
            y.append(value)
    largest = max((one[scale], one["tokens"]) for (name, _), one in counted.items() if name == arm)[1]
    if scale == "parameters" and len(set(d)) > 1:
        try:
            law = fit_scaling_law(n, y, d, what=arm)
            return ArmLaw(arm, law, "", n, y, largest)
        except DataError:
            pass  # budgets go with sizes, or are few: the law along the ladder is what can be told
    try:
        return ArmLaw(arm, fit_scaling_law(n, y, what=arm), "", n, y, largest)
    except DataError as error:
        why = f"{error.what} {f'Found: {error.found}.' if error.found else ''}".strip()
        return ArmLaw(arm, None, why, n, y, largest)


def counted_as(size: float, scale: str) -> str:
    """A size for a reader: 2.9M parameters."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{suffix} {scale}"
    return f"{size:.3g} {scale}"


def _warning(arm: str, line: Trend, scale: str) -> str:
    at = (
        f"{line.smallest:+.4f} at {counted_as(line.smallest_size, scale)}, {line.largest:+.4f} at "
        + counted_as(line.largest_size, scale)
    )
    by = f"{line.slope:+.4f} with a tenfold size ({line.low:+.4f} to {line.high:+.4f})"
    if line.turns:
        return with_minus(
            f"{arm} crosses over: its effect is {at}, and changes by {by}; it is zero at {_crossing(line, scale)}. "
            "What holds at the small size does not at the large one."
        )
    if line.shrinks:
        assert line.crossing is not None
        near = line.crossing <= REACH * line.largest_size
        where = "within ten times the largest size" if near else "far beyond the largest size"
        return with_minus(
            f"{arm}'s effect shrinks with size: {at}; it changes by {by}. Along this line it is nothing at "
            f"{_crossing(line, scale)}, {where}, and the reverse after that."
        )
    return ""


def _crossing(line: Trend, scale: str) -> str:
    assert line.crossing is not None
    low, high = (counted_as(one, "").strip() for one in (line.crossing_low, line.crossing_high))
    return f"{counted_as(line.crossing, scale)} ({low} to {high})"


Table = tuple[list[str], list[list[str]]]


def law_table(found: OverSizes) -> Table:
    """Each arm's law, or why there is none."""
    rows = []
    for one in found.laws:
        if one.law is None:
            rows.append([one.arm, one.why, "", "", "", ""])
            continue
        law = one.law
        names = ("floor", "exponent") + (("data_exponent",) if law.of_data else ())
        cells = [_interval(law, name) for name in names] + ([] if law.of_data else ["none"])
        ahead = law.predict(found.ahead, one.tokens if law.of_data else None)
        rows.append(
            [
                one.arm,
                *cells,
                f"{100 * law.noise:.2f}%",
                f"{ahead.value:.4f} ({ahead.low:.4f} to {ahead.high:.4f})",
            ]
        )
    return [
        "arm", "floor E", "exponent", "data exponent", "noise", f"loss at {counted_as(found.ahead, found.scale)}",
    ], rows  # fmt: skip


def _interval(law: ScalingLaw, name: str) -> str:
    one = law.interval(name)
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def trend_table(found: OverSizes) -> Table:
    """How each arm's difference changes with size."""
    rows = []
    for arm, line in found.trends.items():
        zero = _crossing(line, found.scale) if line.crossing is not None else "not to be told"
        word = (
            "turns"
            if line.turns
            else "shrinks"
            if line.shrinks
            else "changes"
            if line.sure
            else "no sure change"
        )
        rows.append(
            [
                arm,
                *(f"{value:+.4f}".replace("-", "−") for value in (line.smallest, line.largest)),
                f"{line.slope:+.4f} ({line.low:+.4f} to {line.high:+.4f})".replace("-", "−"),
                zero,
                word,
            ]
        )
    return ["arm", "at the smallest", "at the largest", "with a tenfold size", "nothing at", "word"], rows


def as_json(found: OverSizes) -> dict[str, Any]:
    """All figures, for programs."""
    laws: dict[str, Any] = {}
    for one in found.laws:
        if one.law is None:
            laws[one.arm] = {"refused": one.why}
            continue
        names = ("floor", "coefficient", "exponent", "data_coefficient", "data_exponent")
        ahead = one.law.predict(found.ahead, one.tokens if one.law.of_data else None)
        laws[one.arm] = {name: vars(one.law.interval(name)) for name in names if getattr(one.law, name)} | {
            "noise": one.law.noise,
            "ahead": {"size": found.ahead, **vars(ahead)},
        }
    trends = {
        arm: {k: v for k, v in vars(line).items() if k not in ("crossing_low", "crossing_high")}
        | {
            "crossing_low": None if line.crossing is None else line.crossing_low,
            "crossing_high": None if line.crossing is None else line.crossing_high,
            "turns": line.turns,
            "shrinks": line.shrinks,
        }
        for arm, line in found.trends.items()
    }
    return {"scale": found.scale, "laws": laws, "trends": trends}
