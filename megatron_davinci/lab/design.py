"""A design: a question, what is compared, what stays the same, and what decides. One YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from megatron_davinci.config.load import one_screen, problems_of, read_settings
from megatron_davinci.config.section import Section, shown
from megatron_davinci.config.units import Tokens
from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.naming import generated

Setting = dict[str, Any]
"""Values by dotted key: `{curriculum.0.learning_rate.peak: 1.0e-3}`."""

Allowance = Literal["unequal tokens", "unequal repetition"]

_Read = TypeVar("_Read", bound=Section)


class Metric(Section):
    """A figure that runs are compared by."""

    name: str = Field(
        description="heldout_loss.mean, heldout_loss.DOMAIN, heldout_bits_per_byte.mean, "
        "heldout_bits_per_byte.DOMAIN, train_loss (mean of the last tenth of the steps), or task.NAME.METRIC of what "
        "`evaluate` asks"
    )
    better: Literal["lower", "higher"] = "lower"
    margin: float = Field(gt=0, description="The smallest difference that matters, in the metric's unit")

    @model_validator(mode="after")
    def _says_which_way_is_good(self) -> Metric:
        if self.name.startswith("task."):
            if self.name.count(".") < 2:
                raise ValueError(f"a task's metric is task.NAME.METRIC; found {shown(self.name)}")
            if "better" not in self.model_fields_set:
                raise ValueError("better is missing: say whether `lower` or `higher` is; found nothing")
        return self


class Evaluate(Section):
    """What runs are asked once they are done: `davinci eval` with these."""

    suite: Literal["local", "davinci19"] | None = Field(
        default=None, description="local: items of the run's held-out texts; davinci19: the report's"
    )
    tasks: list[str] = Field(default_factory=list, description="Instead of a suite: lm-eval's tasks by name")
    data: Path | None = Field(
        default=None,
        description="Data sets of a suite, in folders of their names on the hub; relative to the design",
    )
    both_ways: bool = Field(
        default=False,
        description="Each of `tasks` that has options by generation too; the local suite always is",
    )
    limit: int | None = Field(default=None, gt=0, description="The first so many items of each task only")

    @model_validator(mode="after")
    def _one_of_them(self) -> Evaluate:
        if (self.suite is None) == (not self.tasks):
            raise ValueError("give either `suite` or `tasks`")
        return self

    @property
    def names(self) -> set[str]:
        """Of its tasks, in each way that they are asked; none where it is a suite."""
        return {*self.tasks, *(map(generated, self.tasks) if self.both_ways else ())}


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
    within: list[str] = Field(
        default_factory=list,
        description="Factors whose levels are not held against each other: the control of an arm has its own level "
        "of them, and of the others the first, so that the answer may be another at each",
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
    evaluate: Evaluate | None = Field(default=None, description="Tasks that finished runs are asked")

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
        if unknown := [name for name in self.within if name not in self.factors]:
            raise ValueError(f"within should name factors; found {', '.join(unknown)}")
        if self.within and (self.combine != "full" or len(set(self.within)) >= len(self.factors)):
            raise ValueError(
                "within needs factors that are combined in full, and one more that is asked about; found others"
            )
        if self.within and (self.ladder or (self.stop and self.stop.behind)):
            raise ValueError(
                "within goes without a ladder and without stop.behind, which have one control; found both"
            )
        if self.arms and not self.varies:
            raise ValueError(
                "`varies` is missing: the keys that the arms are meant to differ in; found nothing"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds should differ; found {self.seeds}")
        if self.branch and self.branch.run and len(self.seeds) > 1 and "{seed}" not in self.branch.run:
            raise ValueError("branch.run: a checkpoint of each seed is needed; found no {seed} in the name")
        first = self.metrics[0].name
        if self.stop and self.stop.behind and (first == "train_loss" or first.startswith("task.")):
            raise ValueError(f"stop.behind: the deciding metric should be measured on the way; found {first}")
        if self.evaluate is None and any(metric.name.startswith("task.") for metric in self.metrics):
            raise ValueError("a metric is of a task; found no `evaluate`, which says what is asked")
        if self.combine == "half" and (
            len(self.factors) < 3 or any(len(one.levels) != 2 for one in self.factors.values())
        ):
            raise ValueError("half needs three or more factors of two levels each; found others")
        return self


def read_as(kind: type[_Read], path: Path, what: str) -> _Read:
    """A YAML file of the lab as what it should hold.

    Args:
        kind: What that is.
        path: The file.
        what: It is called, in messages.

    Raises:
        ConfigError: It cannot be read, or says something impossible; every problem is named, with its line.
    """
    settings, lines = read_settings(
        path, ", ".join(name for name, one in kind.model_fields.items() if one.is_required())
    )
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(
            f"The {what} says what cannot be.",
            where=path,
            found=one_screen(problems_of(error, kind, lines)),
            do=f"mend what is named; docs/concepts/lab.md says what a {what} holds",
        ) from None


def load_design(path: Path) -> Design:
    """Read a design.

    Args:
        path: Its YAML file.

    Raises:
        ConfigError: There is no such file, it is no YAML, or it says something impossible; every problem is named.
    """
    design = read_as(Design, path, "design")
    here = path.resolve().parent
    arms = {
        name: arm if arm.config is None else arm.model_copy(update={"config": here / arm.config})
        for name, arm in design.arms.items()
    }
    branch = design.branch
    if branch is not None and branch.run is not None:
        branch = branch.model_copy(update={"run": str(here / branch.run)})
    evaluate = design.evaluate
    if evaluate is not None and evaluate.data is not None:
        evaluate = evaluate.model_copy(update={"data": here / evaluate.data})
    return design.model_copy(
        update={"base": here / design.base, "arms": arms, "branch": branch, "evaluate": evaluate}
    )
