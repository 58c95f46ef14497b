"""Stages: what is mixed, for how many tokens, in which batches, at which learning rate."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_davinci.config.mixture import DomainMixture, Share, share_problems
from megatron_davinci.config.section import Section
from megatron_davinci.config.transforms import Transforms
from megatron_davinci.config.units import Tokens


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
    mixture: dict[str, Share] = Field(
        min_length=1, description="Share of samples by source or by domain; sums to 1"
    )
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
    def _shares_sum_to_one(cls, value: dict[str, str | DomainMixture]) -> dict[str, str | DomainMixture]:
        if problems := list(share_problems(value)):
            raise ValueError("; ".join(problems))
        return value
