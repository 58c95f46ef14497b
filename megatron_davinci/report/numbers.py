"""How numbers are written on a page: few digits, SI-like suffixes, a true minus sign."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
NOTHING = "–"


def quantity(value: float, digits: int = 3) -> str:
    """A count with `digits` significant digits: 950, 10k, 2M, 1.25B, 4T, 3e38. Not a number: an en dash."""
    if not math.isfinite(value):
        return NOTHING
    if abs(value) >= 1e16:  # what has gone wrong, not what is counted
        return scientific(value, digits)
    for index, (unit, suffix) in enumerate(_SUFFIXES):
        if abs(value) < unit * (1 - 0.5 * 10**-digits):
            continue
        text = _significant(value / unit, digits)
        if abs(float(text)) >= 1000 and index:  # 999,999 is 1M, not 1000k
            unit, suffix = _SUFFIXES[index - 1]
            text = _significant(value / unit, digits)
        return _signed(text) + suffix
    return _signed(_significant(value, digits))


def number(value: float, digits: int = 4) -> str:
    """A measured value with `digits` significant digits: 3.412, 0.05120, 1.2e-5 below a thousandth."""
    if not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return quantity(value, digits)
    if abs(value) < 1e-3:
        return scientific(value, digits)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:.{decimals}f}")


def scientific(value: float, digits: int = 3) -> str:
    """A small value such as a learning rate: 3e-4, 2.95e-5; 0 is "0"."""
    if not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return _signed(mantissa) + (f"e{int(exponent)}" if int(exponent) else "")


def alike(largest: float) -> Callable[[float], str]:
    """How to write values to be compared: with the decimals that give `largest` three significant digits."""
    if not math.isfinite(largest) or largest >= 1000 or largest < 1e-6:
        return number
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return lambda value: _signed(f"{value:.{decimals}f}") if math.isfinite(value) else NOTHING


def signed(value: float) -> str:
    """A difference with its sign and four decimals: +0.0430, −0.0083."""
    return f"{value:+.4f}".replace("-", "−")


def with_minus(text: str) -> str:
    """A text whose negative numbers have a minus sign; hyphens of names and exponents stay."""
    return re.sub(r"(?<![\w.)\]-])-(?=\d)", "−", text)


def percent(fraction: float, digits: int = 3) -> str:
    """A fraction as a percentage: 0.682 is "68.2%"."""
    return NOTHING if not math.isfinite(fraction) else _signed(_significant(100 * fraction, digits)) + "%"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 45 s, 3 min 20 s, 2 h 14 min, 3 d 4 h."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOTHING
    if seconds < 10:
        return f"{_significant(seconds, 2)} s"
    whole = round(seconds)
    for big, small, big_name, small_name in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "min"),
        (60, 1, "min", "s"),
    ):
        if whole >= big:
            rest = whole % big // small
            return f"{whole // big} {big_name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def tick_labels(values: Sequence[float]) -> list[str]:
    """Tick labels, alike in their digits: as many as tell all of them apart, four at least."""
    for digits in range(4, 14):
        labels = [tick(value, digits) for value in values]
        if len({*labels}) == len({*values}):
            break
    return labels


def tick(value: float, digits: int = 4) -> str:
    """A tick label: counts from a thousand get a suffix, values below a thousandth an exponent."""
    if value and abs(value) < 1e-3:
        return scientific(value, digits - 1)
    if abs(value) >= 1000:
        return quantity(value, digits)
    return _signed(f"{value:.{digits + 2}g}")


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _signed(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text
