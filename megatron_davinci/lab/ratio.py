"""The critical mixture ratio out of a design's runs: arms that differ in one domain's share of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from megatron_davinci.config.mixture import exact_share, share_text
from megatron_davinci.config.section import shown
from megatron_davinci.config.units import format_tokens
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.lab.arms import Arm
from megatron_davinci.lab.outcomes import Outcome
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.report.numbers import percent
from megatron_davinci.stats.mixture_ratio import CriticalRatio, critical_ratio


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        stage: Whose mixture it is.
        domain: Whose share is looked for; its held-out loss has to fall.
        general: The held-out domain whose loss may rise by no more than the tolerance.
        tokens: Of the stage that the share is wanted for.
        tolerance: Nats.
    """

    stage: str
    domain: str
    general: str
    tokens: int
    tolerance: float


def answer(arms: Sequence[Arm], outcomes: Sequence[Outcome], asked: Question, where: Path) -> CriticalRatio:
    """Draw the runs of a design on to the tokens that a share is wanted for.

    Args:
        arms: The design's.
        outcomes: Of its runs; those that are done count.
        asked: The question.
        where: The design's file, for errors.

    Raises:
        ConfigError: There is no such stage or domain, or a held-out domain is not measured.
        DataError: Too few runs, shares or evaluations.
    """
    number = _stage(arms[0], asked, where)
    found: dict[float, list[list[float]]] = {}
    for one in outcomes:
        if one.state != "done":
            continue
        config = one.run.arm.config
        mixture = config.curriculum[number].mixture
        if asked.domain not in mixture:
            continue
        share = float(exact_share(asked.domain, share_text(mixture[asked.domain])))
        begins = _begin(one, number)
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
        rows += [
            [at - start, curves[0][at] - curves[0][start], curves[1][at] - curves[1][start]]
            for at in sorted(curves[0])
            if at > start
        ]
    runs = {}
    for share, rows in found.items():
        tokens, general, domain = np.array(sorted(rows)).reshape(-1, 3).T
        runs[share] = (tokens, general, domain)
    return critical_ratio(runs, float(asked.tokens), tolerance=asked.tolerance, what=str(where))


def _stage(arm: Arm, asked: Question, where: Path) -> int:
    names = [stage.name for stage in arm.config.curriculum]
    if asked.stage not in names:
        raise ConfigError(
            "The design's arms have no such stage.",
            where=f"{where}: --stage",
            found=shown(asked.stage),
            expected="one of " + ", ".join(names),
        )
    number = names.index(asked.stage)
    for option, name, known in (
        ("--domain", asked.domain, list(arm.config.curriculum[number].mixture)),
        ("--domain", asked.domain, list(arm.config.data.validation)),
        ("--general", asked.general, list(arm.config.data.validation)),
    ):
        if name not in known:
            raise ConfigError(
                "A domain has to be mixed in the stage and measured, and the general one measured.",
                where=f"{where}: {option}",
                found=shown(name),
                expected="one of " + ", ".join(known),
            )
    return number


def _begin(one: Outcome, number: int) -> float:
    config = one.run.arm.config
    segments = Schedule(config.curriculum, config.data.sequence_length).stage_segments(number)
    return float(segments[0].first_sample * config.data.sequence_length)


def write(folder: Path, arm: Arm, asked: Question, found: CriticalRatio) -> Path | None:
    """Write `ratio.json`, and `curriculum.yaml` with the share where one is feasible.

    Args:
        folder: Where to.
        arm: Whose curriculum the share is put into; the other shares keep their proportions.
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
    if found.ratio is None:
        return None
    stages = [stage.model_dump(mode="json") for stage in arm.config.curriculum]
    stage = next(one for one in stages if one["name"] == asked.stage)
    mixed = next(one.mixture for one in arm.config.curriculum if one.name == asked.stage)
    shares = {name: float(exact_share(name, share_text(entry))) for name, entry in mixed.items()}
    rest = sum(share for name, share in shares.items() if name != asked.domain)
    ten_thousandths = {
        name: round(10_000 * (1 - found.ratio) * share / rest)
        for name, share in shares.items()
        if name != asked.domain
    }
    ten_thousandths[asked.domain] = 10_000 - sum(ten_thousandths.values())
    stage["mixture"] = {
        name: {**entry, "share": ten_thousandths[name] / 10_000}
        if isinstance(entry, dict)
        else ten_thousandths[name] / 10_000
        for name, entry in stage["mixture"].items()
    }
    stage["tokens"] = asked.tokens
    text = yaml.safe_dump({"curriculum": stages}, sort_keys=False, allow_unicode=True)
    path = folder / "curriculum.yaml"
    write_atomically(path, f"# {in_words(asked, found)}\n{text}")
    return path


def in_words(asked: Question, found: CriticalRatio) -> str:
    """The answer in a sentence."""
    after = f"after {format_tokens(asked.tokens)} tokens"
    condition = f"{asked.general} would rise by more than {asked.tolerance:g} nats {after}"
    if found.ratio is None:
        return f"No share of {asked.domain} that was run is feasible: {condition}, or {asked.domain} would not fall."
    top = max(found.feasible)
    if found.ratio >= top:
        return f"Every share of {asked.domain} up to {percent(top)} is feasible; larger ones were not run."
    return (
        f"Up to {percent(found.ratio)} of {asked.domain} ({percent(found.low)} to {percent(found.high)}); with more, "
        f"{condition}."
    )
