"""From a wish to a mixture that may be: within floors, ceilings and the largest change, and of sum 1 exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor, isfinite
from typing import Any

from megatron_davinci.config.controller import UNITS
from megatron_davinci.errors import DataError
from megatron_davinci.train.policies.situation import Bounds, Policy, Situation


@dataclass(frozen=True)
class Decision:
    """A mixture that may be.

    Attributes:
        mixture: Share by unit, in whole millionths; sums to 1.
        reason: Why, in words.
        wish: What the policy would have liked, before bounds.
        details: What the reason rests on.
        changes: Whether any share moves.
    """

    mixture: Mapping[str, Fraction]
    reason: str
    wish: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    changes: bool = True


def decide(policy: Policy, situation: Situation) -> Decision:
    """Ask a policy, and keep what it says within bounds.

    Raises:
        DataError: The last evaluation has a loss that is not finite, or the policy wishes for no mixture.
    """
    for evaluation in situation.evaluations:
        for unit, loss in evaluation.heldout.items():
            if not isfinite(loss):
                raise DataError(
                    f"The held-out loss of {unit} is not a number, so nothing is decided from it.",
                    where=f"the evaluation after step {evaluation.step:,}",
                    found=f"{loss}",
                    expected="a finite loss",
                    do="look at the run's loss before this step; the journal is as it was",
                )
    wish = policy.wish(situation)
    mixture = within_bounds(wish.mixture, situation.mixture, situation.bounds)
    changes = any(mixture[unit] != share for unit, share in situation.mixture.items())
    return Decision(mixture, wish.reason, dict(wish.mixture), wish.details, changes)


def within_bounds(
    wish: Mapping[str, float], present: Mapping[str, Fraction], bounds: Bounds
) -> dict[str, Fraction]:
    """The mixture nearest to a wish, in squared distance, that bounds allow.

    Args:
        wish: Share by unit; scaled to sum to 1.
        present: Share by unit; sums to 1. One that lies outside of its floor or ceiling, where an edit has put it,
            goes back to it by what the largest change allows, and no further away.
        bounds: How far shares may go.

    Returns:
        Share by unit in whole millionths; sums to 1 exactly. The present mixture itself, where the wish is that.

    Raises:
        DataError: The wish is no mixture, or bounds leave none.
    """
    names = sorted(present)
    values = [float(wish.get(name, 0.0)) for name in names]
    total = sum(values)
    if not all(isfinite(value) and value >= 0 for value in values) or not total > 0 or set(wish) - set(names):
        raise DataError(
            "A policy wished for something that is no mixture.",
            found=dict(wish),
            expected=f"shares of 0 or more of {', '.join(names)}",
        )
    if all(abs(value / total - float(present[name])) < 0.5 / UNITS for name, value in zip(names, values)):
        return dict(present)
    floors = [bounds.floors.get(name, Fraction(0)) for name in names]
    ceilings = [bounds.ceilings.get(name, Fraction(1)) for name in names]
    lows, highs = [], []
    for name, least, most in zip(names, floors, ceilings, strict=True):
        now, change = present[name], bounds.maximum_change
        lows.append(ceil(max(least, now - change) * UNITS) if least <= now else floor(now * UNITS))
        highs.append(floor(min(most, now + change) * UNITS) if now <= most else ceil(now * UNITS))
    if any(low > high for low, high in zip(lows, highs)) or not sum(lows) <= UNITS <= sum(highs):
        raise DataError(
            "The bounds of the controller leave no mixture that can be reached from the present one.",
            where="controller.floors, ceilings and maximum_change",
            found=", ".join(f"{name} {float(present[name]):g}" for name in names),
            do="mend the bounds so that the present mixture lies within them",
        )
    wanted = [value / total * UNITS for value in values]
    if any(not least <= present[name] <= most for name, least, most in zip(names, floors, ceilings)):
        # Of what the largest change allows, the nearest to where it is to come to.
        inside = [ceil(least * UNITS) for least in floors], [floor(most * UNITS) for most in ceilings]
        if sum(inside[0]) <= UNITS <= sum(inside[1]):
            wanted = [float(share) for share in _nearest(wanted, *inside)]
    return {
        name: Fraction(share, UNITS) for name, share in zip(names, _nearest(wanted, lows, highs), strict=True)
    }


def _nearest(wanted: list[float], lows: list[int], highs: list[int]) -> list[int]:
    """Whole numbers between `lows` and `highs` that sum to `UNITS`, nearest to `wanted` but for rounding."""

    def moved(offset: float) -> list[float]:
        return [
            min(max(want + offset, low), high) for want, low, high in zip(wanted, lows, highs, strict=True)
        ]

    # The nearest point moves every coordinate that is free by the same amount (a projection on a box and a plane).
    below, above = -2.0 * UNITS, 2.0 * UNITS
    for _ in range(80):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(moved(middle)) < UNITS else (below, middle)
    exact = moved(above)
    shares = [min(max(floor(value), low), high) for value, low, high in zip(exact, lows, highs, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))
    rest = UNITS - sum(shares)
    while rest:
        step = 1 if rest > 0 else -1
        for i in order if step > 0 else reversed(order):
            if rest and lows[i] <= shares[i] + step <= highs[i]:
                shares[i] += step
                rest -= step
    return shares


def as_text(share: Fraction) -> str:
    """A share as text that is exactly it: a decimal where it is one of at most six digits, else a fraction."""
    scaled = share * UNITS
    if scaled.denominator != 1:
        return f"{share.numerator}/{share.denominator}"
    return f"{scaled.numerator // UNITS}.{scaled.numerator % UNITS:06d}".rstrip("0").rstrip(".")
