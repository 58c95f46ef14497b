"""Stages: what is mixed, for how many tokens, in which batches, at which learning rate."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_davinci.config.mixture import DomainMixture, Share, share_problems
from megatron_davinci.config.section import Section
from megatron_davinci.config.transforms import Transforms
from megatron_davinci.config.units import Tokens

_WITH_END = ("linear", "cosine", "1-sqrt", "wsd")


class BatchPhase(Section):
    """A global batch size, and for how long it holds; the last phase does not say, and holds to the end.

    A phase in tokens or samples ends at the first step boundary at or after them, counted from where the phase before
    it was to end: what one takes too much, the next takes less.
    """

    size: int = Field(gt=0, description="Sequences a step")
    steps: int | None = Field(default=None, gt=0, description="How long it holds; or `tokens`, or `samples`")
    tokens: Tokens | None = Field(default=None, gt=0, description="How long it holds, in tokens")
    samples: int | None = Field(default=None, gt=0, description="How long it holds, in sequences")

    @model_validator(mode="after")
    def _one_length(self) -> BatchPhase:
        if len(self.lengths) > 1:
            raise ValueError(f"one of `steps`, `tokens` and `samples`; found {' and '.join(self.lengths)}")
        return self

    @property
    def lengths(self) -> list[str]:
        """In which units it says how long it holds: none or one of `steps`, `tokens`, `samples`."""
        return [unit for unit in ("steps", "tokens", "samples") if getattr(self, unit) is not None]


class LearningRate(Section):
    """The learning rate inside a stage: an optional linear warm-up, then a shape.

    `wsd` stays at the peak and decays at the end of the stage (warm-up, stable, decay; Hu et al. 2024, arXiv
    2404.06395). `1-sqrt` is the decay of Hägele et al. (2024, arXiv 2405.18392): steep first, then flat.
    """

    shape: Literal["constant", "linear", "cosine", "1-sqrt", "wsd"] = Field(
        default="constant", description="What follows the warm-up"
    )
    peak: float = Field(ge=0, description="Where the warm-up arrives and the shape begins")
    end: float | None = Field(
        default=None, ge=0, description="Where every shape but constant arrives, at the stage's last step"
    )
    warmup_steps: int = Field(default=0, ge=0, description="Linear, from `warmup_from` to `peak`")
    warmup_tokens: Tokens | None = Field(default=None, gt=0, description="The same, in tokens of the stage")
    warmup_from: float = Field(default=0.0, ge=0, description="Where the warm-up begins")
    decay: Literal["linear", "cosine", "1-sqrt", "exponential"] | None = Field(
        default=None, description="How `wsd` goes from peak to end; default: 1-sqrt"
    )
    decay_steps: int | None = Field(default=None, gt=0, description="Of `wsd`: the last steps of the stage")
    decay_tokens: Tokens | None = Field(default=None, gt=0, description="The same, in tokens")

    @model_validator(mode="after")
    def _end_belongs_to_the_shape(self) -> LearningRate:
        if (self.end is None) != (self.shape == "constant"):
            raise ValueError(
                f"shape {self.shape} {'needs' if self.end is None else 'has no'} `end` "
                f"(constant stays at peak; {', '.join(_WITH_END)} go from peak to end)"
            )
        return self

    @model_validator(mode="after")
    def _one_length_each(self) -> LearningRate:
        if self.warmup_steps and self.warmup_tokens is not None:
            raise ValueError("a warm-up has `warmup_steps` or `warmup_tokens`, not both")
        if self.warmup_from and not self.warmup_steps and self.warmup_tokens is None:
            raise ValueError(
                "`warmup_from` says where a warm-up begins; it needs `warmup_steps` or `warmup_tokens`"
            )
        told = [key for key in ("decay_steps", "decay_tokens") if getattr(self, key) is not None]
        if self.shape == "wsd" and len(told) != 1:
            raise ValueError(
                f"shape wsd needs `decay_steps` or `decay_tokens`; found {' and '.join(told) or 'none'}"
            )
        if self.shape != "wsd" and (told or self.decay is not None):
            named = told[0] if told else "decay"
            raise ValueError(f"`{named}` is of shape wsd; shape {self.shape} goes on to the stage's end")
        if self.decay == "exponential" and not (self.end and self.peak):
            raise ValueError("decay exponential never arrives at 0: give an `end` and a `peak` above it")
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
    weight_decay: float | None = Field(
        default=None, ge=0, description="In this stage; default: `optimizer.weight_decay`"
    )
    max_epochs: dict[str, float] = Field(
        default_factory=dict,
        description="How often a source, or each of a domain, may have been passed through when the stage ends, "
        "since the run's beginning; `all` for every one. One number is the same as `all`",
    )
    evaluate_every_steps: int | None = Field(
        default=None, ge=0, description="In this stage; default: `evaluation.every_steps`; 0: only at its end"
    )
    transforms: Transforms = Transforms()

    @field_validator("global_batch_size", mode="before")
    @classmethod
    def _one_size_is_a_list_of_one(cls, value: Any) -> Any:
        return [{"size": value}] if isinstance(value, int | float | str) else value

    @field_validator("global_batch_size", mode="after")
    @classmethod
    def _only_the_last_phase_is_open(cls, value: list[BatchPhase]) -> list[BatchPhase]:
        if not value:
            raise ValueError("needs at least one batch size")
        if value[-1].lengths or not all(phase.lengths for phase in value[:-1]):
            raise ValueError(
                "every batch size but the last says for how many `steps`, `tokens` or `samples`; the last holds to "
                "the end"
            )
        return value

    @field_validator("mixture", mode="after")
    @classmethod
    def _shares_sum_to_one(cls, value: dict[str, str | DomainMixture]) -> dict[str, str | DomainMixture]:
        if problems := list(share_problems(value)):
            raise ValueError("; ".join(problems))
        return value

    @field_validator("max_epochs", mode="before")
    @classmethod
    def _one_cap_is_for_all(cls, value: Any) -> Any:
        # Text too: `1e1` is no number to YAML, and one everywhere else here.
        plain = isinstance(value, int | float | str) and not isinstance(value, bool)
        return {"all": value} if plain else value

    @field_validator("max_epochs", mode="after")
    @classmethod
    def _caps_allow_something(cls, value: dict[str, float]) -> dict[str, float]:
        for name, cap in value.items():
            if cap <= 0:
                raise ValueError(
                    f"the cap of {name} is not above 0; found {cap:g}. A weight of 0 ends its use"
                )
        return value

    @model_validator(mode="after")
    def _the_rate_s_parts_fit_the_stage(self) -> Stage:
        rate = self.learning_rate
        parts = (rate.warmup_tokens or 0) + (rate.decay_tokens or 0)
        if parts > self.tokens:
            raise ValueError(
                f"learning_rate: warm-up and decay take {parts:,} tokens, and the stage has {self.tokens:,}"
            )
        return self
