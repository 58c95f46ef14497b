"""The control check: do the arms differ in what is asked about, and in nothing else?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_davinci.config import RunConfig
from megatron_davinci.config.section import shown
from megatron_davinci.config.units import format_tokens
from megatron_davinci.errors import ConfigError, DavinciError
from megatron_davinci.lab.arms import Arm, Run, flat, runs_of
from megatron_davinci.lab.design import Design
from megatron_davinci.lab.outcomes import TASK
from megatron_davinci.lab.pasts import not_shared, past_of, pasts_of
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.plan_sources import plan_sources, planned_order

MISSING = "(not there)"
_MEASURED = ("data.validation", "evaluation")
_SAME_FLOPS = 0.01
_UNEVEN = 1.5
"""A source that one arm passes through this many times as often as another, and more than once, is worn unequally."""


@dataclass(frozen=True)
class Confound:
    """Something that arms differ in beside the factor.

    Attributes:
        kind: `setting`, `measurement`, `tokens`, `flops`, `repetition`, `past` or `seeds`.
        what: In words, with the key and each arm's value.
        do: What to do about it.
    """

    kind: str
    what: str
    do: str


@dataclass(frozen=True)
class Cost:
    """What a run of an arm takes.

    Attributes:
        tokens: To train on.
        flops: Forward and backward.
        epochs: Passes through each source whose size is known.
    """

    tokens: int
    flops: float
    epochs: dict[str, float]


def cost_of(config: RunConfig) -> Cost:
    """What a run takes, by its configuration."""
    schedule = Schedule(config.curriculum, config.data.sequence_length)
    tokens = schedule.total_samples * config.data.sequence_length
    sources = plan_sources(config, schedule, *planned_order(config, schedule))
    epochs = {one.name: one.epochs[-1] for one in sources if one.epochs is not None}
    return Cost(tokens, tokens * config.model.flops_per_token(config.data.sequence_length), epochs)


def differences(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Keys that arms of one size do not share a value of: `{key: {arm: value}}`."""
    settings = {
        arm.name: flat(arm.config.model_dump(mode="json", exclude={"run": {"directory"}})) for arm in arms
    }
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    found = {}
    for key in keys:
        values = {name: one.get(key, MISSING) for name, one in settings.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            found[key] = values
    return found


def check(design: Design, arms: Sequence[Arm]) -> list[Confound]:
    """Look for whatever could explain a difference beside the factor.

    Args:
        design: The design.
        arms: All of its arms, at all sizes.
    """
    found: list[Confound] = []
    if len(design.seeds) < 2:
        found.append(
            Confound(
                "seeds",
                f"one seed ({design.seeds[0]}): nothing tells an effect from noise",
                "give two or more",
            )
        )
    for size in dict.fromkeys(arm.size for arm in arms):
        there = [arm for arm in arms if arm.size == size]
        at = f"at {size}: " if size else ""
        for one in (*_settings(design, there), *_amounts(design, there)):
            found.append(Confound(one.kind, at + one.what, one.do))
        for said in not_shared(design, there):
            found.append(
                Confound("past", at + said, "let arms differ after they branch only, or share no past")
            )
    found += _metrics(design, arms)
    return found


def refuse(design: Design, arms: Sequence[Arm], where: object) -> None:
    """Raise where the check finds something, or the design costs more than its budget.

    Raises:
        ConfigError: Naming all of it.
    """
    found = check(design, arms)
    if found:
        raise ConfigError(
            "The arms differ in more than what is asked about, so no verdict could follow.",
            where=where,
            found="\n".join(one.what for one in found),
            do="; ".join(dict.fromkeys(one.do for one in found)),
        )
    runs = len(arms) * len(design.seeds)
    tokens = tokens_of(design, runs_of(design, list(arms)))
    budget = design.budget
    if (budget.runs or runs) < runs or (budget.tokens or tokens) < tokens:
        raise ConfigError(
            "The design costs more than its budget.",
            where=where,
            found=f"{runs} runs, {format_tokens(tokens)} tokens",
            expected=f"at most {budget.runs or runs} runs, {format_tokens(budget.tokens or tokens)} tokens",
            do="fewer arms, seeds or tokens, or a larger budget",
        )


def tokens_of(design: Design, runs: Sequence[Run]) -> int:
    """Tokens that are trained on: those of a shared past once, runs of one identity once."""
    pasts = pasts_of(design, runs)
    before = {one.identity: cost_of(one.arm.config).tokens for one in pasts}
    total = sum(before.values())
    for run in {run.identity: run for run in runs}.values():
        past = past_of(design, run)
        total += cost_of(run.arm.config).tokens - (0 if past is None else before[past.identity])
    return total


def allowed(design: Design) -> list[str]:
    """Keys that arms may differ in."""
    return [*design.varies, *(factor.key for factor in design.factors.values())]


def _within(key: str, keys: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _settings(design: Design, arms: Sequence[Arm]) -> Iterator[Confound]:
    may = allowed(design)
    for key, values in differences(arms).items():
        said = "; ".join(f"{name} has {shown(value)}" for name, value in values.items())
        if _within(key, _MEASURED):
            yield Confound(
                "measurement",
                f"{key}: {said}",
                "measure all arms alike: the same held-out data and evaluations",
            )
        elif key == "run.seed" or not _within(key, may):
            yield Confound(
                "setting",
                f"{key}: {said}",
                "make it the same in all arms, or list it under `varies` if it is meant",
            )


def _amounts(design: Design, arms: Sequence[Arm]) -> Iterator[Confound]:
    costs: dict[str, Cost] = {}
    for arm in arms:
        try:
            costs[arm.name] = cost_of(arm.config)
        except DavinciError as error:
            yield Confound(
                "repetition", f"{arm.name}: {error.what} {error.found or ''}".strip(), "mend that arm"
            )
    if not costs:
        return
    tokens = {name: cost.tokens for name, cost in costs.items()}
    flops = {name: cost.flops for name, cost in costs.items()}
    if (
        design.held_constant == "tokens"
        and len(set(tokens.values())) > 1
        and "unequal tokens" not in design.allow
    ):
        said = "; ".join(f"{name} {count:,}" for name, count in tokens.items())
        yield Confound(
            "tokens", f"tokens a run: {said}", "give all arms the same tokens, or allow `unequal tokens`"
        )
    if design.held_constant == "flops" and max(flops.values()) > (1 + _SAME_FLOPS) * min(flops.values()):
        said = "; ".join(f"{name} {count:.4g}" for name, count in flops.items())
        yield Confound("flops", f"FLOPs a run: {said}", "give all arms the same FLOPs, to a percent")
    if "unequal repetition" in design.allow:
        return
    for source in dict.fromkeys(name for cost in costs.values() for name in cost.epochs):
        passes = {name: cost.epochs[source] for name, cost in costs.items() if cost.epochs.get(source, 0) > 0}
        if (
            len(passes) > 1
            and max(passes.values()) > 1
            and max(passes.values()) > _UNEVEN * min(passes.values())
        ):
            said = "; ".join(f"{name} {count:.2f}" for name, count in passes.items())
            yield Confound(
                "repetition",
                f"passes through source {source}: {said}",
                "give the source more text or the runs fewer tokens, or allow `unequal repetition`",
            )


def _metrics(design: Design, arms: Sequence[Arm]) -> Iterator[Confound]:
    for metric in design.metrics:
        kind, _, domain = metric.name.partition(".")
        if (kind == "train_loss" and not domain) or metric.name.startswith(TASK):
            continue  # what tasks came to is known once runs are asked; a design says that they are
        for arm in arms:
            domains = list(arm.config.data.validation)
            known = kind in ("heldout_loss", "heldout_bits_per_byte") and domain in ("mean", *domains)
            if not domains or not known:
                yield Confound(
                    "measurement",
                    f"metric {metric.name}: {arm.name} does not measure it (its held-out domains: "
                    f"{', '.join(domains) or 'none'})",
                    "choose a metric that every arm has",
                )
                break
