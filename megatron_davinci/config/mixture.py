"""Mixtures as they are written: shares of sources, of domains, and how a domain divides its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from megatron_davinci.config.section import Section, shown

_HUGE_EXPONENT = re.compile(r"[eE][+-]?[0-9_]{4,}")
_SLACK = Fraction(1, 10**9)  # what shares of ten decimals may miss of 1


def _as_decimal_text(value: Any) -> Any:
    # Weights stay decimal text: 0.1 means one tenth exactly, in the config and in the journal.
    if isinstance(value, bool):
        raise ValueError(f"a weight is a number; found {value}")
    return repr(value) if isinstance(value, int | float) else value


Weight = Annotated[str, BeforeValidator(_as_decimal_text)]
"""A share as text: `0.1` is one tenth exactly, `1/3` a third."""


def exact_share(name: str, weight: str) -> Fraction:
    """A weight as a fraction.

    Raises:
        ValueError: It is no number, or negative.
    """
    try:
        # A fraction of 1e-999999999 has so many digits that making it would not end.
        share = Fraction(weight if not _HUGE_EXPONENT.search(weight) else "")
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"the weight of {name} is not a number: {shown(weight)}") from None
    if share < 0:
        raise ValueError(f"the weight of {name} is negative: {shown(weight)}")
    return share


class DomainMixture(Section):
    """The share of a domain, and how its sources divide it: by pool size, unless something else is said."""

    share: Weight = Field(description="Of the stage's samples")
    sources: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Only these of the domain's; default: all that have no own share",
    )
    weights: dict[str, Weight] | None = Field(
        default=None, min_length=1, description="Of these sources, in any unit; instead of pool sizes"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="Pool sizes to the power 1/T: 1 is by size, a large one all alike"
    )

    @field_validator("weights", mode="after")
    @classmethod
    def _weights_divide(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and not sum(exact_share(name, weight) for name, weight in value.items()):
            raise ValueError("one of the weights has to be above 0")
        return value

    @model_validator(mode="after")
    def _one_way_to_divide(self) -> DomainMixture:
        if self.weights is not None and (self.sources is not None or self.temperature is not None):
            other = "sources" if self.sources is not None else "temperature"
            raise ValueError(f"`weights` says which sources there are and what each has; leave out `{other}`")
        if self.sources is not None and len(set(self.sources)) < len(self.sources):
            raise ValueError("`sources` names one twice")
        return self


def _kind(value: Any) -> str:
    return "<domain>" if isinstance(value, dict | DomainMixture) else "<weight>"


# Tags in angle brackets are left out of the places that errors name.
Share = Annotated[
    Annotated[Weight, Tag("<weight>")] | Annotated[DomainMixture, Tag("<domain>")], Discriminator(_kind)
]
"""What a mixture says of a name: its share, or a section with the share and how it is divided."""


def share_text(entry: str | DomainMixture) -> str:
    """The share of an entry of a mixture, as it is written."""
    return entry if isinstance(entry, str) else entry.share


def share_problems(mixture: Mapping[str, str | DomainMixture]) -> Iterator[str]:
    """What is wrong with the shares of a mixture: each, or else their sum."""
    total, whole = Fraction(0), True
    for name, entry in mixture.items():
        text = share_text(entry)
        try:
            share = exact_share(name, text)
            if share > 1:
                raise ValueError(f"the weight of {name} exceeds 1: {shown(text)}")
            total += share
        except ValueError as error:
            whole = False
            yield str(error)
    if whole and abs(total - 1) > _SLACK:
        yield f"the weights sum to {float(total):.10g}, not to 1"
