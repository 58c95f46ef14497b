"""The critical mixture ratio out of a design's runs: arms that differ in one domain's share of a stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import yaml

from megatron_davinci.config.mixture import DomainMixture, exact_share, share_text
from megatron_davinci.config.section import shown
from megatron_davinci.config.units import format_tokens
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.lab.arms import Arm
from megatron_davinci.lab.control import differences
from megatron_davinci.lab.outcomes import Outcome
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.report.numbers import percent
from megatron_davinci.stats.mixture_ratio import CriticalRatio, critical_ratio

_UNIT = 10_000
"""What shares are written in."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        stage: Whose mixture it is.
        domain: Whose share is looked for; its held-out loss has to fall.
        general: The held-out domain whose loss may rise by no more than the tolerance.
        tokens: Of the stage that the share is wanted for.
        tolerance: Nats.
        size: Of the ladder that is looked at; empty for the only one.
    """

    stage: str
    domain: str
    general: str
    tokens: int
    tolerance: float
    size: str = ""


def answer(arms: Sequence[Arm], outcomes: Sequence[Outcome], asked: Question, where: Path) -> CriticalRatio:
    """Draw the runs of a design on to the tokens that a share is wanted for.

    Args:
        arms: The design's.
        outcomes: Of its runs; those that are done count.
        asked: The question.
        where: The design's file, for errors.

    Raises:
        ConfigError: There is no such stage, domain or size, a held-out domain is not measured, or the arms differ in
            more than the stage's mixture.
        DataError: Too few runs, shares or evaluations.
    """
    if not math.isfinite(asked.tolerance):
        raise ConfigError(
            "No share follows from this.",
            where="--tolerance",
            found=asked.tolerance,
            expected="nats: a number",
        )
    if asked.tokens < 1:
        raise ConfigError(
            "This is no token count.", where="--tokens", found=asked.tokens, expected="1 or more"
        )
    arms = _of_size(arms, asked, where)
    number = _stage(arms, asked, where)
    found: dict[float, list[list[float]]] = {}
    for one in outcomes:
        if one.state != "done" or one.run.arm.size != arms[0].size:
            continue
        share = float(_share(one.run.arm, number, asked.domain))
        begins, ends = _bounds(one, number)
        curves = [dict(zip(*one.curve(f"heldout_loss.{name}"))) for name in (asked.general, asked.domain)]
        start = max((at for at in curves[0] if at <= begins), default=None)
        if start is None:
            raise DataError(
                "A run was not evaluated where its stage begins.",
                where=f"{where}: {one.run.label}",
                expected=f"an evaluation at {begins:,.0f} tokens or before",
                do="let a stage stand before it, at whose end there is an evaluation",
            )
        rows = found.setdefault(share, [])
        # What later stages do to a loss is not this mixture's doing.
        rows += [
            [at - start, curves[0][at] - curves[0][start], curves[1][at] - curves[1][start]]
            for at in sorted(curves[0])
            if start < at <= ends
        ]
    if not found:
        raise DataError(
            "No run of the design is done.",
            where=where,
            found=", ".join(sorted({one.state for one in outcomes})) or "no run",
            do=f"davinci lab run {where}, or name the lab's folder by --out",
        )
    runs = {}
    for share, rows in found.items():
        tokens, general, domain = np.array(sorted(rows)).reshape(-1, 3).T
        runs[share] = (tokens, general, domain)
    return critical_ratio(runs, float(asked.tokens), tolerance=asked.tolerance, what=str(where))


def _of_size(arms: Sequence[Arm], asked: Question, where: Path) -> list[Arm]:
    sizes = list(dict.fromkeys(arm.size for arm in arms))
    if asked.size not in sizes and (asked.size or len(sizes) > 1):
        raise ConfigError(
            "What a model bears depends on its size, so that one of the ladder's has to be named.",
            where=f"{where}: --size",
            found=shown(asked.size) if asked.size else "none",
            expected="one of " + ", ".join(sizes) if any(sizes) else "none: the design has no ladder",
        )
    return [arm for arm in arms if arm.size == (asked.size or sizes[0])]


def _stage(arms: Sequence[Arm], asked: Question, where: Path) -> int:
    config = arms[0].config
    names = [stage.name for stage in config.curriculum]
    if asked.stage not in names:
        raise ConfigError(
            "The design's arms have no such stage.",
            where=f"{where}: --stage",
            found=shown(asked.stage),
            expected="one of " + ", ".join(names),
        )
    number = names.index(asked.stage)
    key = f"curriculum.{number}.mixture"
    if others := [one for one in differences(arms) if not f"{one}.".startswith(f"{key}.")]:
        raise ConfigError(
            "The arms differ in more than the stage's mixture, so no share follows from them.",
            where=where,
            found=", ".join(others),
            expected=f"a difference in {key} only",
            do="ask of a design whose arms differ in the domain's share and nothing else",
        )
    # A control may well be one without the domain.
    mixed = list(dict.fromkeys(name for arm in arms for name in arm.config.curriculum[number].mixture))
    for option, name, known in (
        ("--domain", asked.domain, mixed),
        ("--domain", asked.domain, list(config.data.validation)),
        ("--general", asked.general, list(config.data.validation)),
    ):
        if name not in known:
            raise ConfigError(
                "A domain has to be mixed in the stage and measured, and the general one measured.",
                where=f"{where}: {option}",
                found=shown(name),
                expected="one of " + ", ".join(known),
            )
    return number


def _share(arm: Arm, number: int, domain: str) -> Fraction:
    """A domain's share of a stage of an arm; 0 where the arm does not mix it."""
    entry = arm.config.curriculum[number].mixture.get(domain, "0")
    return exact_share(domain, share_text(entry))


def _bounds(one: Outcome, number: int) -> tuple[float, float]:
    """Tokens before a stage's first step, and after its last."""
    config = one.run.arm.config
    segments = Schedule(config.curriculum, config.data.sequence_length).stage_segments(number)
    length = config.data.sequence_length
    return float(segments[0].first_sample * length), float(segments[-1].end_sample * length)


def write(folder: Path, arms: Sequence[Arm], asked: Question, found: CriticalRatio) -> Path | None:
    """Write `ratio.json`, and `curriculum.yaml` with the share where one is feasible.

    Args:
        folder: Where to.
        arms: The design's. The share is put into the curriculum of the first that mixes the domain with others; the
            others keep their proportions.
        asked: The question.
        found: Its answer.

    Returns:
        The curriculum's file; None where no share is feasible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "ratio.json",
        {
            **vars(asked),
            "ratio": found.ratio,
            "low": found.low,
            "high": found.high,
            "feasible": {f"{share:g}": value for share, value in found.feasible.items()},
            "general_change": {f"{share:g}": value for share, value in found.general.items()},
            "domain_change": {f"{share:g}": value for share, value in found.domain.items()},
        },
    )
    path = folder / "curriculum.yaml"
    if found.ratio is None:
        path.unlink(missing_ok=True)  # an earlier question's, whose share would be taken for this one's
        return None
    number = [stage.name for stage in arms[0].config.curriculum].index(asked.stage)
    # Three shares or more were run, so one of them leaves something to the others.
    config = next(
        arm.config
        for arm in arms
        if asked.size in ("", arm.size) and 0 < _share(arm, number, asked.domain) < 1
    )
    stages = [stage.model_dump(mode="json") for stage in config.curriculum]
    stage = stages[number]
    shares = _with_share(config.curriculum[number].mixture, asked.domain, found.ratio)
    stage["mixture"] = {
        name: {**entry, "share": shares[name]} if isinstance(entry, dict) else shares[name]
        for name, entry in stage["mixture"].items()
    }
    stage["tokens"] = asked.tokens
    text = yaml.safe_dump({"curriculum": stages}, sort_keys=False, allow_unicode=True)
    write_atomically(path, f"# {in_words(asked, found)}\n{text}")
    return path


def _with_share(mixture: Mapping[str, str | DomainMixture], domain: str, ratio: float) -> dict[str, float]:
    """Shares of four decimals that sum to 1: the domain's is the ratio, however many others there are."""
    own = round(_UNIT * ratio)
    others = {name: exact_share(name, share_text(one)) for name, one in mixture.items() if name != domain}
    exact = {name: (_UNIT - own) * share / sum(others.values()) for name, share in others.items()}
    whole = {name: int(share) for name, share in exact.items()}
    left = _UNIT - own - sum(whole.values())
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[:left]:
        whole[name] += 1
    return {name: (own if name == domain else whole[name]) / _UNIT for name in mixture}


def in_words(asked: Question, found: CriticalRatio) -> str:
    """The answer in a sentence."""
    after = f"after {format_tokens(asked.tokens)} tokens"
    condition = f"{asked.general} would rise by more than {asked.tolerance:g} nats {after}"
    if found.ratio is None:
        return f"No share of {asked.domain} that was run is feasible: {condition}, or {asked.domain} would not fall."
    top = max(found.feasible)
    if found.ratio >= top:
        if top == 1:
            return f"Every share of {asked.domain} is feasible."
        return f"Every share of {asked.domain} up to {percent(top)} is feasible; larger ones were not run."
    return (
        f"Up to {percent(found.ratio)} of {asked.domain} ({percent(found.low)} to {percent(found.high)}); with more, "
        f"{condition}."
    )
