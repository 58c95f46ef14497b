"""Stages: what is mixed, for how many tokens, in which batches, at which learning rate."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_davinci.config.section import Section, shown
from megatron_davinci.config.transforms import Transforms
from megatron_davinci.config.units import Tokens

_HUGE_EXPONENT = re.compile(r"[eE][+-]?[0-9_]{4,}")


def _as_decimal_text(value: Any) -> Any:
    # Weights stay decimal text: 0.1 means one tenth exactly, in the config and in the journal.
    if isinstance(value, bool):
        raise ValueError(f"a weight is a number; found {value}")
    return repr(value) if isinstance(value, int | float) else value


Weight = Annotated[str, BeforeValidator(_as_decimal_text)]


class BatchPhase(Section):
    """A global batch size and for how many steps it holds; the last phase has no `steps`."""

    size: int = Field(gt=0, description="Sequences a step")
    steps: int | None = Field(default=None, gt=0, description="How long it holds; the last has none")


class LearningRate(Section):
    """The learning rate inside a stage: an optional linear warm-up, then a shape."""

    shape: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="What follows the warm-up"
    )
    peak: float = Field(ge=0, description="Where the warm-up arrives and the shape begins")
    end: float | None = Field(
        default=None, ge=0, description="Where linear and cosine arrive at the stage's end"
    )
    warmup_steps: int = Field(default=0, ge=0, description="Linear, from `warmup_from` to `peak`")
    warmup_from: float = Field(default=0.0, ge=0, description="Where the warm-up begins")

    @model_validator(mode="after")
    def _end_belongs_to_the_shape(self) -> LearningRate:
        if (self.end is None) != (self.shape == "constant"):
            raise ValueError(
                f"shape {self.shape} {'needs' if self.end is None else 'has no'} `end` "
                "(constant stays at peak; linear and cosine go from peak to end)"
            )
        return self


class Stage(Section):
    """One stage of the curriculum."""

    name: str = Field(min_length=1, description="In records, journal and report; unique")
    tokens: Tokens = Field(
        gt=0, description="The stage ends at the first step at or after their cumulative sum"
    )
    mixture: dict[str, Weight] = Field(min_length=1, description="Share of samples by source; sums to 1")
    global_batch_size: list[BatchPhase] = Field(
        description="Sequences a step: one number, or a list of phases"
    )
    learning_rate: LearningRate
    transforms: Transforms = Transforms()

    @field_validator("global_batch_size", mode="before")
    @classmethod
    def _one_size_is_a_list_of_one(cls, value: Any) -> Any:
        return [{"size": value}] if isinstance(value, int) else value

    @field_validator("global_batch_size", mode="after")
    @classmethod
    def _only_the_last_phase_is_open(cls, value: list[BatchPhase]) -> list[BatchPhase]:
        if not value:
            raise ValueError("needs at least one batch size")
        if value[-1].steps is not None or any(phase.steps is None for phase in value[:-1]):
            raise ValueError(
                "every batch size but the last says for how many `steps`; the last holds to the end"
            )
        return value

    @field_validator("mixture", mode="after")
    @classmethod
    def _shares_sum_to_one(cls, value: dict[str, str]) -> dict[str, str]:
        shares: dict[str, Fraction] = {}
        for source, weight in value.items():
            try:
                # A fraction of 1e-999999999 has so many digits that making it would not end.
                shares[source] = Fraction(weight if not _HUGE_EXPONENT.search(weight) else "")
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"the weight of {source} is not a number: {shown(weight)}") from None
            if shares[source] < 0:
                raise ValueError(f"the weight of {source} is negative: {shown(weight)}")
            if shares[source] > 1:
                raise ValueError(f"the weight of {source} exceeds 1: {shown(weight)}")
        total = sum(shares.values(), Fraction(0))
        if abs(total - 1) > Fraction(1, 10**9):
            raise ValueError(f"the weights sum to {float(total):.10g}, not to 1")
        return value
