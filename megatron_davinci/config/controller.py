"""The controller that may change the mixture as the run goes: who decides, within which bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.mixture import Weight, exact_share, share_text
from megatron_davinci.config.section import Section

UNITS = 10**6
"""Shares of a controller are whole millionths, so that they sum to 1 exactly."""


class SaturationPolicy(Section):
    """Settings of `saturation`."""

    format_domains: list[str] = Field(
        default_factory=list,
        description="Domains of another format (`qa`): they stay as they are until every other one has saturated",
    )
    importance: dict[str, float] = Field(
        default_factory=dict, description="What a nat of a domain counts for; default 1"
    )
    horizon: float = Field(
        default=1.0, gt=0, le=1, description="Share of the tokens left that returns are counted over"
    )


class DomainUpsamplingPolicy(Section):
    """Settings of `domain_upsampling`."""

    final_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Of the run, at its end; the paper tried 0.05 to 0.3"
    )
    mixture: dict[str, Weight] = Field(
        default_factory=dict, description="What is moved to then, by unit; sums to 1"
    )


class SpecialisedPolicy(Section):
    """Settings of `specialised`."""

    domain: str = Field(default="", description="The small domain; the first stage has it from the start")
    share: Weight = Field(
        default="0.02", description="What it is to have; the paper's best lie in 0.02 to 0.1"
    )
    largest_gap_growth: float = Field(
        default=0.05,
        gt=0,
        description="Nats by which held-out less training loss may grow before it is halved",
    )


class LossWeightedPolicy(Section):
    """Settings of `loss_weighted`."""

    reference: dict[str, float] = Field(
        default_factory=dict, description="Held-out loss of a reference model by domain, nats a token"
    )
    step_size: float = Field(default=1.0, gt=0, description="Of the exponentiated gradient, per nat")
    smoothing: float = Field(
        default=1e-3, ge=0, lt=1, description="Share that is spread evenly over all domains, as in DoReMi"
    )


class ControllerConfig(Section):
    """Who changes the mixture as the run goes, and how far they may go."""

    mode: Literal["off", "advise", "apply"] = Field(
        default="off",
        description="advise: write what it would do to proposals.jsonl and the page; "
        "apply: also do it, from the next step on",
    )
    policy: Literal["fixed", "saturation", "domain_upsampling", "specialised", "loss_weighted"] = Field(
        default="saturation", description="Who decides"
    )
    unit: Literal["domain", "source"] = Field(
        default="domain", description="What shares are of; inside a domain, sources keep their proportions"
    )
    every_evaluations: int = Field(default=1, gt=0, description="Decide at every so many evaluations")
    stages: list[str] | None = Field(
        default=None, min_length=1, description="Only in these stages; default: in all"
    )
    floors: dict[str, Weight] = Field(default_factory=dict, description="Least share by unit; default 0")
    ceilings: dict[str, Weight] = Field(default_factory=dict, description="Largest share by unit; default 1")
    maximum_change: Weight = Field(
        default="0.1", description="By which any share may move in one decision; at least 0.001"
    )
    saturation: SaturationPolicy = SaturationPolicy()
    domain_upsampling: DomainUpsamplingPolicy = DomainUpsamplingPolicy()
    specialised: SpecialisedPolicy = SpecialisedPolicy()
    loss_weighted: LossWeightedPolicy = LossWeightedPolicy()


def controller_problems(
    controller: ControllerConfig, curriculum: Sequence[Stage], data: DataConfig, every_steps: int | None
) -> Iterator[str]:
    """What is wrong with a controller: every problem, each beginning with its key.

    Args:
        controller: The section.
        curriculum: The stages, whose mixtures name known sources and domains.
        data: The sources and their domains.
        every_steps: How often the run evaluates within stages.
    """
    if controller.mode == "off":
        return
    by_domain = controller.unit == "domain"
    units = {data.domain(source) if by_domain else source for source in data.sources}
    validated = set(data.validation)
    stages = {stage.name: _shares(stage, data, by_domain) for stage in curriculum}
    known = ", ".join(sorted(units))
    for key, names in _named(controller):
        for name in sorted(set(names) - units):
            yield f"controller.{key} names {name}; there is {known}"
    for name in sorted(set(controller.stages or ()) - set(stages)):
        yield f"controller.stages names {name}; the curriculum has {', '.join(stages)}"
    yield from _bound_problems(controller, units, stages)
    if controller.policy in ("saturation", "loss_weighted", "specialised"):
        if controller.unit == "source":
            missing = sorted(units - validated)
            what = "held-out loss is of domains; a source needs one of its own name"
        else:
            missing, what = sorted(units - validated), "each has to be evaluated"
        if missing:
            yield (
                f"controller.policy: {controller.policy} looks at held-out loss ({what}): data.validation lacks "
                + ", ".join(missing)
            )
    elif not validated:
        yield "controller.mode: decisions are made at evaluations, and data.validation is empty: nothing is evaluated"
    named = [stage for stage in curriculum if controller.stages is None or stage.name in controller.stages]
    own = [stage.evaluate_every_steps for stage in named]
    if not any(every_steps if every is None else every for every in own):
        yield (
            "controller.mode: decisions are made at evaluations within stages, and there are none: set "
            "evaluation.every_steps, or evaluate_every_steps of a stage"
        )
    yield from _policy_problems(controller, units, stages)


def _shares(stage: Stage, data: DataConfig, by_domain: bool) -> dict[str, Fraction]:
    """Share by unit at a stage's beginning; of sources, those that do not depend on the sizes of pools."""
    found: dict[str, Fraction] = {}
    if by_domain:
        found = {data.domain(source): Fraction(0) for source in data.sources}
    for name, entry in stage.mixture.items():
        share = exact_share(name, share_text(entry))
        if by_domain:
            unit = data.domain(name) if name in data.sources and isinstance(entry, str) else name
            found[unit] = found.get(unit, Fraction(0)) + share
        elif name in data.sources and isinstance(entry, str):
            found[name] = share
    return found


def _named(controller: ControllerConfig) -> Iterator[tuple[str, list[str]]]:
    yield "floors", list(controller.floors)
    yield "ceilings", list(controller.ceilings)
    if controller.policy == "saturation":
        yield "saturation.format_domains", controller.saturation.format_domains
        yield "saturation.importance", list(controller.saturation.importance)
    if controller.policy == "domain_upsampling":
        yield "domain_upsampling.mixture", list(controller.domain_upsampling.mixture)
    if controller.policy == "specialised":
        yield "specialised.domain", [controller.specialised.domain] if controller.specialised.domain else []
    if controller.policy == "loss_weighted":
        yield "loss_weighted.reference", list(controller.loss_weighted.reference)


def _share(key: str, text: str) -> Fraction:
    share = exact_share(key, text)
    if share > 1:
        raise ValueError(f"{key} exceeds 1: {text}")
    if (share * UNITS).denominator != 1:
        raise ValueError(f"{key} has more than six decimals: {text}")
    return share


def _bound_problems(
    controller: ControllerConfig, units: set[str], stages: dict[str, dict[str, Fraction]]
) -> Iterator[str]:
    bounds: dict[str, dict[str, Fraction]] = {"floors": {}, "ceilings": {}}
    for kind, texts in (("floors", controller.floors), ("ceilings", controller.ceilings)):
        for name, text in texts.items():
            try:
                bounds[kind][name] = _share(f"controller.{kind}.{name}", text)
            except ValueError as error:
                yield str(error)
    floors, ceilings = bounds["floors"], bounds["ceilings"]
    try:
        change = _share("controller.maximum_change", controller.maximum_change)
        if change < Fraction(1, 1000):
            yield f"controller.maximum_change is at least 0.001; found {controller.maximum_change}"
    except ValueError as error:
        yield str(error)
    crossed = [name for name in floors if floors[name] > ceilings.get(name, 1)]
    for name in crossed:
        yield f"controller.floors.{name} ({floors[name]!s}) is above its ceiling ({ceilings[name]!s})"
    if (least := sum(floors.values(), Fraction(0))) > 1:
        yield f"controller.floors sum to {float(least):g}; no mixture has more than 1"
    if (most := sum((ceilings.get(name, Fraction(1)) for name in units), Fraction(0))) < 1:
        yield f"controller.ceilings sum to {float(most):g}; every mixture has 1"
    for stage, mixture in stages.items():
        if controller.stages is not None and stage not in controller.stages:
            continue
        for name in sorted(units):
            if name not in mixture:
                continue
            share = mixture[name]
            low, high = floors.get(name, Fraction(0)), ceilings.get(name, Fraction(1))
            if not low <= share <= high:
                yield (
                    f"controller.floors: stage {stage} begins with {float(share):g} of {name}, outside floors and "
                    f"ceilings ({float(low):g} to {float(high):g}); mend one of them, or name other "
                    "controller.stages"
                )


def _policy_problems(
    controller: ControllerConfig, units: set[str], stages: dict[str, dict[str, Fraction]]
) -> Iterator[str]:
    if controller.policy == "domain_upsampling":
        mixture = controller.domain_upsampling.mixture
        try:
            total = sum((exact_share(name, text) for name, text in mixture.items()), Fraction(0))
            if total != 1:
                yield f"controller.domain_upsampling.mixture sums to {float(total):.10g}, not to 1"
        except ValueError as error:
            yield f"controller.domain_upsampling.mixture: {error}"
    if controller.policy == "specialised":
        settings = controller.specialised
        first = next(iter(stages.values()))
        try:
            _share("controller.specialised.share", settings.share)
        except ValueError as error:
            yield str(error)
        if not settings.domain:
            yield f"controller.specialised.domain: say which is the small one of {', '.join(sorted(units))}"
        elif settings.domain in units and not first.get(settings.domain):
            yield (
                "controller.specialised.domain: it has to be there from the start and the first stage has no "
                f"{settings.domain}"
            )
    if controller.policy == "loss_weighted" and (missing := units - set(controller.loss_weighted.reference)):
        yield f"controller.loss_weighted.reference lacks {', '.join(sorted(missing))}"
