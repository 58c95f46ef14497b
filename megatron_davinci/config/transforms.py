"""What happens to a stage's samples between the data and the model."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_davinci.config.section import Section, shown


def _name_or_id(value: object) -> object:
    # Said here, since a union would answer once for each of its members.
    named = isinstance(value, str) and value
    numbered = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not (named or numbered):
        raise ValueError(f"a token is its name in the tokenizer, or its id; found {shown(value)}")
    return value


Token = Annotated[str | int, BeforeValidator(_name_or_id)]
"""A token by its name in `data.tokenizer`, or by its id."""


class MetadataPrefix(Section):
    """Each document that begins in a sample begins with its source's `metadata`, which carries no loss (MeCo)."""

    fraction: float = Field(default=1.0, gt=0, le=1, description="Share of samples that get it")


class FillInTheMiddle(Section):
    """Some documents become prefix, suffix, middle, each after a token of its own (Bavarian et al., 2022)."""

    rate: float = Field(gt=0, le=1, description="Share of documents, of each sample's")
    spm_fraction: float = Field(
        default=0.5, ge=0, le=1, description="Share of those whose suffix comes first (SPM, not PSM)"
    )
    sources: list[str] = Field(default_factory=list, description="Whose documents; by source")
    domains: list[str] = Field(default_factory=list, description="And by domain")
    prefix_token: Token = Field(description="What the prefix follows: a token's name, or its id")
    suffix_token: Token = Field(description="What the suffix follows")
    middle_token: Token = Field(description="What the middle follows")

    @model_validator(mode="after")
    def _of_some_source_with_three_tokens(self) -> FillInTheMiddle:
        if not self.sources and not self.domains:
            raise ValueError("fill_in_the_middle needs `sources` or `domains`")
        if len({self.prefix_token, self.suffix_token, self.middle_token}) < 3:
            raise ValueError("prefix_token, suffix_token and middle_token have to differ")
        return self


class Transforms(Section):
    """What happens to a stage's samples."""

    document_mask: bool = Field(
        default=False,
        description="Attention stays inside a document, and no label is in another document than its input",
    )
    reset_positions: bool = Field(
        default=False, description="With document_mask: positions begin at 0 in every document"
    )
    prompt_loss_weight: float = Field(
        default=0.0, ge=0, le=1, description="Of labels that a source's mask leaves out; two decimals at most"
    )
    metadata_prefix: MetadataPrefix | None = Field(
        default=None, description="`{}` or a section: documents begin with their source's metadata"
    )
    fill_in_the_middle: FillInTheMiddle | None = Field(
        default=None, description="Documents rearranged so that their middle comes last"
    )

    @field_validator("prompt_loss_weight", mode="after")
    @classmethod
    def _weights_are_hundredths(cls, value: float) -> float:
        # Megatron-Core counts labels in an int32: weights are whole numbers of a common part.
        if (Fraction(repr(value)) * 100).denominator != 1:
            raise ValueError("a weight has two decimals at most")
        return value

    @model_validator(mode="after")
    def _positions_restart_where_attention_does(self) -> Transforms:
        if self.reset_positions and not self.document_mask:
            # Tokens of two documents would have distances that mean nothing.
            raise ValueError("reset_positions: true needs document_mask: true")
        return self

    @property
    def label_weights(self) -> tuple[int, int]:
        """What a prompt's label and any other weigh, as the smallest whole numbers: 0.5 is (1, 2), 0 is (0, 1)."""
        weight = Fraction(repr(self.prompt_loss_weight))
        return weight.numerator, weight.denominator
