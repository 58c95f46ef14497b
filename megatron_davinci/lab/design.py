"""A design: a question, what is compared, what stays the same, and what decides. One YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from megatron_davinci.config.section import Section, shown
from megatron_davinci.config.units import Tokens
from megatron_davinci.errors import ConfigError, DataError

Setting = dict[str, Any]
"""Values by dotted key: `{curriculum.0.learning_rate.peak: 1.0e-3}`."""

Allowance = Literal["unequal tokens", "unequal repetition"]


class Metric(Section):
    """A figure that runs are compared by."""

    name: str = Field(
        description="heldout_loss.mean, heldout_loss.DOMAIN, heldout_bits_per_byte.mean, "
        "heldout_bits_per_byte.DOMAIN or train_loss (mean of the last tenth of the steps)"
    )
    better: Literal["lower", "higher"] = "lower"
    margin: float = Field(gt=0, description="The smallest difference that matters, in the metric's unit")


class ArmConfig(Section):
    """One side of the comparison: differences from the base, or a configuration of its own."""

    set: Setting = Field(default_factory=dict, description="Values by dotted key")
    config: Path | None = Field(default=None, description="Instead of the base; relative to the design")
    words: str = Field(default="", description="What it is, for the reader")


class Factor(Section):
    """A setting with levels; the first is the control's."""

    key: str = Field(min_length=1, description="Dotted key")
    levels: dict[str, Any] = Field(min_length=2, description="Values by the level's name")


class Budget(Section):
    """What the design may cost; more is refused before anything is started."""

    runs: int | None = Field(default=None, gt=0)
    tokens: Tokens | None = Field(default=None, gt=0, description="Of all runs together")


class Branch(Section):
    """Where arms begin, if not at the beginning."""

    after: str | None = Field(
        default=None,
        description="A stage's name: what is before its end is trained once a seed, and branched from",
    )
    run: str | None = Field(
        default=None,
        description="RUN@STEP, a checkpoint that is there, relative to the design; {seed}, {size} are a run's",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Branch:
        if (self.after is None) == (self.run is None):
            raise ValueError("give either `after` (a stage) or `run` (RUN@STEP)")
        if self.run is not None and not self.run.rpartition("@")[2].isdecimal():
            raise ValueError(f"run should name a step, as in runs/base@4000; found {shown(self.run)}")
        return self


class Stop(Section):
    """Runs that may be stopped before their end; those of the control only where they diverge."""

    diverged: float | None = Field(
        default=None,
        gt=0,
        description="Nats that the training loss may lie above its lowest, in means of 20 steps",
    )
    behind: float | None = Field(
        default=None,
        gt=0,
        description="How far the deciding metric may lie behind the control's of the same seed",
    )
    after: float = Field(default=0.5, gt=0, lt=1, description="Share of the steps from which `behind` counts")

    @model_validator(mode="after")
    def _says_something(self) -> Stop:
        if self.diverged is None and self.behind is None:
            raise ValueError("give `diverged`, `behind` or both")
        return self


class Design(Section):
    """What a design's file holds."""

    question: str = Field(min_length=1)
    base: Path = Field(description="A run configuration; relative to the design")
    overrides: Setting = Field(default_factory=dict, description="For every arm, by dotted key")
    arms: dict[str, ArmConfig] = Field(default_factory=dict, description="By name; the first is the control")
    factors: dict[str, Factor] = Field(default_factory=dict, description="Instead of arms")
    combine: Literal["full", "one-at-a-time", "half"] = Field(
        default="full",
        description="How factors are combined: all levels with all; each alone against the control; or half of the "
        "full design of two-level factors, the last of which is the product of the others",
    )
    ladder: dict[str, Setting] = Field(
        default_factory=dict, description="Every arm at each of these sizes: differences by dotted key"
    )
    control: str | None = Field(default=None, description="The arm that others are compared with")
    varies: list[str] = Field(
        default_factory=list,
        description="Keys that arms may differ in, with all below them; factors' keys are among them by themselves",
    )
    held_constant: Literal["tokens", "flops"] = "tokens"
    allow: dict[Allowance, str] = Field(
        default_factory=dict, description="What the check would refuse, and why it is meant"
    )
    seeds: list[int] = Field(min_length=1, description="Each arm has all of them, so that arms are paired")
    metrics: list[Metric] = Field(min_length=1, description="The first decides; the others are shown")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="Chance of a false verdict")
    budget: Budget = Budget()
    branch: Branch | None = Field(default=None, description="Arms share a past, or begin at a checkpoint")
    stop: Stop | None = Field(default=None, description="Runs that may be stopped early; none by default")

    @model_validator(mode="after")
    def _one_way_to_say_the_arms(self) -> Design:
        if bool(self.arms) == bool(self.factors):
            raise ValueError(
                "give either `arms` (two or more) or `factors`; found " + ("both" if self.arms else "neither")
            )
        if self.arms and len(self.arms) < 2:
            raise ValueError("a comparison needs two arms; found one")
        if self.arms and self.control is not None and self.control not in self.arms:
            raise ValueError(f"control should be one of {', '.join(self.arms)}; found {shown(self.control)}")
        if self.factors and self.control is not None:
            raise ValueError("with factors the control is their first levels; found a control")
        if self.arms and not self.varies:
            raise ValueError(
                "`varies` is missing: the keys that the arms are meant to differ in; found nothing"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds should differ; found {self.seeds}")
        if self.branch and self.branch.run and len(self.seeds) > 1 and "{seed}" not in self.branch.run:
            raise ValueError("branch.run: a checkpoint of each seed is needed; found no {seed} in the name")
        if self.stop and self.stop.behind and self.metrics and self.metrics[0].name == "train_loss":
            raise ValueError(
                "stop.behind: the deciding metric should be measured on the way; found train_loss"
            )
        if self.combine == "half" and (
            len(self.factors) < 3 or any(len(one.levels) != 2 for one in self.factors.values())
        ):
            raise ValueError("half needs three or more factors of two levels each; found others")
        return self


def load_design(path: Path) -> Design:
    """Read a design.

    Args:
        path: Its YAML file.

    Raises:
        DataError: There is no such file, or it is no YAML.
        ConfigError: It says something impossible; every problem is named.
    """
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError("The design cannot be read.", where=path, found=error.strerror) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError("The design is not YAML.", where=path, found=error) from None
    try:
        design = Design.model_validate(said)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc']) or 'the design'}: "
            + item["msg"].removeprefix("Value error, ")
            for item in error.errors()
        ]
        raise ConfigError(
            "The design has a problem."
            if len(problems) == 1
            else f"The design has {len(problems)} problems.",
            where=path,
            found="\n".join(problems[:20]),
            do="mend what is named; docs/concepts/lab.md says what a design holds",
        ) from None
    here = path.resolve().parent
    arms = {
        name: arm if arm.config is None else arm.model_copy(update={"config": here / arm.config})
        for name, arm in design.arms.items()
    }
    branch = design.branch
    if branch is not None and branch.run is not None:
        branch = branch.model_copy(update={"run": str(here / branch.run)})
    return design.model_copy(update={"base": here / design.base, "arms": arms, "branch": branch})
