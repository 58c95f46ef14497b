"""Token counts as people write them: `4T`, `100B`, `2.5M`, `300k`, `4096`."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

from megatron_davinci.config.section import shown

LARGEST = 10**18
"""More tokens than anyone will train on, few enough for every count in bytes to fit 64 bits."""
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PATTERN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([kKmMbBtT]?)\s*")


def parse_tokens(value: object) -> int:
    """Read a token count.

    Args:
        value: An integer, or text such as `4T`, `2.5M` or `100_000`. Scales are decimal (k = 1000).

    Returns:
        The number of tokens.

    Raises:
        ValueError: The text is not a count, or not a whole number of tokens.
    """
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    match = _PATTERN.fullmatch(str(value)) if plain else None
    if match is None:
        raise ValueError(f"a token count is a number or text like 4T, 100B, 2.5M; found {shown(value)}")
    try:
        number = Decimal(match[1].replace("_", ""))
    except InvalidOperation:  # an exponent beyond those of decimals
        number = Decimal("inf")
    # Compared before it is multiplied out: 1e999999999 would not end.
    if number > LARGEST or Fraction(number) * _SCALE[match[2].lower()] > LARGEST:
        raise ValueError(f"a token count is at most 10^18; found {shown(value)}")
    tokens = Fraction(number) * _SCALE[match[2].lower()]
    if tokens.denominator != 1:
        raise ValueError(f"a token count is a whole number of tokens; found {shown(value)}")
    return int(tokens)


def format_tokens(tokens: int | float) -> str:
    """Write a token count with three significant digits: 4_000_000_000_000 -> `4T`, 294_912 -> `295k`."""
    for suffix, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        # 999,600 reads as 1M, not as 1e+03k.
        if tokens >= scale * 0.9995:
            return f"{float(f'{tokens / scale:.3g}'):g}{suffix}"
    return f"{tokens:g}"


Tokens = Annotated[int, BeforeValidator(parse_tokens)]
"""A pydantic field type: a token count, written as in `parse_tokens`."""
