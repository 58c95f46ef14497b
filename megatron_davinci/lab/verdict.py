"""From outcomes to verdicts: better, worse, equivalent, not enough evidence; and none where it would be unfounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_davinci.lab.arms import Arm, Run
from megatron_davinci.lab.control import Confound
from megatron_davinci.lab.design import Design, Metric
from megatron_davinci.lab.outcomes import TASK, Outcome
from megatron_davinci.lab.over_sizes import OverSizes, over_sizes
from megatron_davinci.lab.over_sizes import as_json as sizes_as_json
from megatron_davinci.report.numbers import with_minus
from megatron_davinci.stats.comparison import Paired, holm, paired, pairs_needed, pooled_deviation, power

Word = Literal["better", "worse", "equivalent", "not enough evidence", "refused"]


@dataclass(frozen=True)
class Comparison:
    """An arm against the control, by one metric, at one size.

    Attributes:
        arm: The arm's name.
        against: Its control's.
        size: Of the ladder; empty where there is none.
        metric: Its metric.
        values: The arm's by seed.
        control: The control's by seed.
        found: The paired difference, arm less control; None where no seed has both.
        word: The verdict.
        why: Why it is refused; empty otherwise.
        p: Of no difference, corrected for all comparisons by this metric.
        p_same: Of a difference of the margin or more, corrected likewise.
    """

    arm: str
    against: str
    size: str
    metric: Metric
    values: dict[int, float]
    control: dict[int, float]
    found: Paired | None
    word: Word
    why: str = ""
    p: float = 1.0
    p_same: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What a design has shown so far.

    Attributes:
        design: The design.
        control: The control's name; that of the first, where there are several.
        comparisons: By metric, size and arm.
        warnings: Effects that shrink or turn over the ladder, and what is missing.
        noise: Standard deviation of a pair's difference by the first metric, over all comparisons; None if unknown.
        seeds_needed: Pairs that would show the margin with a power of 0.8 under that noise, in the worst case of the
            correction for all deciding comparisons; None if unknown or many.
        power: Of this design, for an effect of the margin, under that noise, likewise; None if unknown.
        over_sizes: What the ladder tells of laws and trends; None without one.
    """

    design: Design
    control: str
    comparisons: list[Comparison]
    warnings: list[str] = field(default_factory=list)
    noise: float | None = None
    seeds_needed: int | None = None
    power: float | None = None
    over_sizes: OverSizes | None = None

    def by(self, metric: str) -> list[Comparison]:
        """Those of one metric."""
        return [one for one in self.comparisons if one.metric.name == metric]

    @property
    def controls(self) -> str:
        """The control, or that each arm has its own."""
        return "its control" if self.design.within else self.control

    @property
    def deciding(self) -> list[Comparison]:
        """Those of the metric that decides."""
        return self.by(self.design.metrics[0].name)


def judge(
    design: Design,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    confounds: Sequence[Confound] = (),
) -> Verdict:
    """Compare every arm with the control of its size.

    Args:
        design: The design.
        arms: Its arms.
        runs: Its runs.
        outcomes: One for each run.
        confounds: What the control check found: figures are shown, and no verdict follows from them.
    """
    control = arms[0].name
    by_arm: dict[tuple[str, str], dict[int, Outcome]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        by_arm.setdefault((run.arm.size, run.arm.name), {})[run.seed] = outcome
    comparisons: list[Comparison] = []
    for metric in design.metrics:
        drafts = [
            _draft(metric, arm, by_arm[arm.size, arm.name], by_arm[arm.size, arm.against], design.seeds)
            for arm in arms
            if arm.against
        ]
        if confounds:
            why = "something else could explain a difference: " + confounds[0].what
            drafts = [replace(one, word="refused", why=one.why or why) for one in drafts]
        comparisons += _decide(drafts, design.alpha)
    verdict = Verdict(design, control, comparisons)
    noise = pooled_deviation([one.found for one in verdict.deciding if one.found is not None])
    margin = design.metrics[0].margin
    # Holm's worst case: an effect whose p-value is the smallest of all has to be below this.
    alpha = design.alpha / max(1, len(verdict.deciding))
    found = None
    if len(design.ladder) > 1:
        differences = {(one.arm, one.size): one.found for one in verdict.deciding if one.found is not None}
        found = over_sizes(arms, runs, outcomes, design.metrics[0].name, differences, design.alpha)
    return Verdict(
        design,
        control,
        comparisons,
        warnings=[
            *(f"{one.what}; {one.do}" for one in confounds),
            *_missing(outcomes),
            *(found.warnings if found else []),
        ],
        noise=noise,
        seeds_needed=None if noise is None else pairs_needed(margin, noise, alpha=alpha),
        power=None if noise is None else power(margin, noise, len(design.seeds), alpha),
        over_sizes=found,
    )


def _draft(
    metric: Metric,
    arm: Arm,
    ours: Mapping[int, Outcome],
    theirs: Mapping[int, Outcome],
    seeds: Sequence[int],
) -> Comparison:
    values = {seed: value for seed, one in ours.items() if (value := one.metric(metric.name)) is not None}
    control = {seed: value for seed, one in theirs.items() if (value := one.metric(metric.name)) is not None}
    shared = sorted(set(values) & set(control))
    missing = [seed for seed in seeds if seed not in shared]
    unlike = {seed: said for seed in shared if (said := _unlike(metric, ours[seed], theirs[seed]))}
    shared = [seed for seed in shared if seed not in unlike]
    why = ""
    if missing:
        ended = [one for seed in missing for one in _of(seed, ours, theirs) if one.state != "done"]
        named = ", ".join(map(str, missing))
        why = f"no pair of runs with seed {named} has come to its end"
        if metric.name.startswith(TASK) and not ended:
            why = f"{metric.name} is not known of a pair of runs with seed {named}: they have not been asked"
        stopped = [seed for seed in missing if seed in ours and ours[seed].state == "stopped"]
        broken = [
            seed for seed in missing if any(one.diverged(metric.name) for one in _of(seed, ours, theirs))
        ]
        if broken:
            why = f"with seed {', '.join(map(str, broken))} {metric.name} is no number at the end: a run has diverged"
        if stopped:
            named = ", ".join(map(str, stopped))
            why += f"; with seed {named} it was stopped by the design's rule: {ours[stopped[0]].why}"
    elif unlike:
        named, said = ", ".join(map(str, unlike)), next(iter(unlike.values()))
        why = f"runs with seed {named} were not asked the same for {metric.name}: {said}"
    elif len(shared) < 2:
        why = "one seed tells no effect from noise"
    found = paired({seed: values[seed] for seed in shared}, control) if shared else None
    word: Word = "refused" if why else "not enough evidence"
    return Comparison(arm.name, arm.against, arm.size, metric, values, control, found, word, why)


def _of(seed: int, *arms: Mapping[int, Outcome]) -> list[Outcome]:
    return [outcomes[seed] for outcomes in arms if seed in outcomes]


def _unlike(metric: Metric, ours: Outcome, theirs: Outcome) -> str:
    """What a pair of runs was asked differently for a task's score; empty where nothing, or it is of no task."""
    one, other = ours.score(metric.name), theirs.score(metric.name)
    return "" if one is None or other is None else one.unlike(other)


def _decide(drafts: Sequence[Comparison], alpha: float) -> list[Comparison]:
    """Words for the comparisons of one metric, corrected for their number."""
    judged = [one for one in drafts if one.word != "refused" and one.found is not None]
    different = holm([one.found.p_difference for one in judged if one.found])
    same = holm([one.found.p_equivalence(one.metric.margin) for one in judged if one.found])
    words = {
        id(one): (p, q, _word(one, p, q, alpha)) for one, p, q in zip(judged, different, same, strict=True)
    }
    found = []
    for one in drafts:
        p, q, word = words.get(id(one), (1.0, 1.0, one.word))
        found.append(replace(one, word=word, p=p, p_same=q))
    return found


def _word(one: Comparison, p: float, p_same: float, alpha: float) -> Word:
    assert one.found is not None
    if p_same < alpha:
        return "equivalent"  # whatever else: the difference is smaller than matters
    if p >= alpha:
        return "not enough evidence"
    lower = one.found.mean < 0
    return "better" if lower == (one.metric.better == "lower") else "worse"


def _missing(outcomes: Sequence[Outcome]) -> list[str]:
    said = []
    for state, words in (
        ("failed", "failed"),
        ("stopped", "stopped early"),
        ("begun", "not at its end"),
        ("to do", "not begun"),
    ):
        names = [one.run.label for one in outcomes if one.state == state]
        if names:
            said.append(f"{len(names)} run{'s' if len(names) > 1 else ''} {words}: " + "; ".join(names[:6]))
    return said


def seeds_in_words(verdict: Verdict) -> str:
    """How many seeds would show the margin under the noise that was found, and how many there are."""
    need = "more than 1,000" if verdict.seeds_needed is None else str(verdict.seeds_needed)
    count, margin = len(verdict.deciding), verdict.design.metrics[0].margin
    corrected = f" with p-values corrected for {count} comparisons" if count > 1 else ""
    return (
        f"Seeds that show a difference of {margin:g} in four cases of five{corrected}: {need}; this design has "
        f"{len(verdict.design.seeds)}."
    )


def in_words(one: Comparison) -> str:
    """A verdict as a sentence, with its figures."""
    control = one.against
    at = f" at {one.size}" if one.size else ""
    if one.word == "refused" or one.found is None:
        return f"{one.arm}{at}: no verdict, since {one.why}."
    figures = with_minus(
        f"{one.metric.name} {one.found.mean:+.4f} (95% interval {one.found.low:+.4f} to {one.found.high:+.4f}, "
        f"{one.found.pairs} seeds)"
    )
    margin = f"{one.metric.margin:g}"
    return {
        "better": f"{one.arm}{at} is better than {control}: {figures}.",
        "worse": f"{one.arm}{at} is worse than {control}: {figures}.",
        "equivalent": f"{one.arm}{at} and {control} are equivalent within {margin}: {figures}.",
        "not enough evidence": f"{one.arm}{at} against {control}: not enough evidence for a difference, nor for "
        f"equivalence within {margin}: {figures}.",
    }[one.word]


def as_json(verdict: Verdict) -> dict[str, Any]:
    """All figures, for programs."""

    def plain(one: Comparison) -> dict[str, Any]:
        found = one.found
        known = found is not None and found.pairs > 1
        return {
            "arm": one.arm,
            "against": one.against,
            "size": one.size,
            "metric": one.metric.name,
            "margin": one.metric.margin,
            "verdict": one.word,
            "why": one.why,
            "mean": None if found is None else round(found.mean, 6),
            "low": round(found.low, 6) if known and found is not None else None,
            "high": round(found.high, 6) if known and found is not None else None,
            "p": round(one.p, 6),
            "p_equivalence": round(one.p_same, 6),
            "by_seed": {} if found is None else {str(seed): round(d, 6) for seed, d in found.each.items()},
            "values": {str(seed): round(value, 6) for seed, value in one.values.items()},
            "control_values": {str(seed): round(value, 6) for seed, value in one.control.items()},
        }

    return {
        "question": verdict.design.question,
        "control": verdict.control,
        "seeds": verdict.design.seeds,
        "comparisons": [plain(one) for one in verdict.comparisons],
        "warnings": verdict.warnings,
        "noise_of_a_pair": None if verdict.noise is None else round(verdict.noise, 6),
        "power_for_the_margin": None if verdict.power is None else round(verdict.power, 4),
        "seeds_needed_for_the_margin": verdict.seeds_needed,
        **({} if verdict.over_sizes is None else {"over_sizes": sizes_as_json(verdict.over_sizes)}),
    }
