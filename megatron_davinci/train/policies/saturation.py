"""`saturation`: share goes from domains that have saturated to those that still grow (daVinci-LLM, sections 4.2 and
4.3).

Balance first: among domains of plain text, the tokens that are left are divided by what more of each would bring, by
the curves fitted to its held-out loss. Then intensify: once all of them have saturated, share goes to the domains of
another format (questions and answers), which until then keep what they have.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies.returns import LEAST_EVALUATIONS, Outlook, divide, look
from megatron_davinci.train.policies.situation import Situation, Wish


class SaturationPolicy:
    """Divides by fitted returns, and shifts the format when plain text has nothing more to give."""

    reads_training_loss = False

    def __init__(self, config: ControllerConfig) -> None:
        self._settings = config.saturation

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        kept = situation.kept()
        formats = [unit for unit in kept if unit in self._settings.format_domains]
        plain = [unit for unit in kept if unit not in formats]
        seen = look(situation, plain)
        details = {unit: _detail(outlook) for unit, outlook in seen.items()}
        waiting = [unit for unit in plain if seen[unit].forecast is None]
        if waiting:
            words = ", ".join(f"{unit} {seen[unit].points}" for unit in waiting)
            return Wish(
                kept,
                f"not enough is known yet: evaluations of {words}; {LEAST_EVALUATIONS} are the fewest",
                details,
            )
        if formats and all(seen[unit].state == "saturated" for unit in plain):
            return Wish(
                {unit: 1 / len(formats) if unit in formats else 0.0 for unit in kept},
                f"{_words(seen)}: plain text has nothing more to give, so the format shifts to {', '.join(formats)}",
                details,
            )
        free = sum(kept[unit] for unit in plain)
        left = situation.tokens_left * self._settings.horizon * free
        if not plain or left <= 0:
            return Wish(kept, "no tokens are left to divide", details)
        planned = divide(seen, left, free, situation, self._settings.importance)
        if planned is None:
            return Wish(kept, f"{_words(seen)}; no domain of plain text is expected to gain", details)
        forgets = _forgetting(seen)
        mixture = {**kept, **largest_first(planned, situation, 2 - forgets)}
        moves = [
            f"{unit} {kept[unit]:.1%} to {mixture[unit]:.1%}"
            for unit in plain
            if abs(mixture[unit] - kept[unit]) >= 0.001
        ]
        wished = "by returns of the tokens left: " + (", ".join(moves) or "as it is")
        return Wish(mixture, f"{_words(seen)}; forgetting {forgets:.0%}; {wished}", details)


def largest_first(planned: Mapping[str, float], situation: Situation, power: float = 2.0) -> dict[str, float]:
    """Shares for now, of a plan for all tokens that are left.

    What was given cannot be taken back, and after a knee, floors and what other domains teach go on giving. So the
    later a knee is met, the less is lost; and of what is known well already, a token is the least likely to meet
    one. Domains with large plans therefore go first: shares are in proportion to the square of the plan, as far as
    bounds allow. What a bound takes from one domain is spread in proportion too. That is where order is free; a model
    that forgets does best with what is planned, at once and to the end, a power of 1.
    """
    bounds, units = situation.bounds, sorted(planned)
    present = np.array([float(situation.mixture[unit]) for unit in units])
    change = float(bounds.maximum_change)
    low = np.maximum([float(bounds.floors.get(unit, 0)) for unit in units], present - change)
    high = np.minimum([float(bounds.ceilings.get(unit, 1)) for unit in units], present + change)
    wanted = np.maximum(np.array([planned[unit] for unit in units]) ** power, 1e-9)
    # The one factor with which the shares sum to what they have now, found by halving on a logarithmic scale.
    below, above = -30.0, 30.0
    for _ in range(80):
        middle = (below + above) / 2
        total = np.clip(np.exp(middle) * wanted, low, high).sum()
        below, above = (middle, above) if total < present.sum() else (below, middle)
    shares = np.clip(np.exp(above) * wanted, low, high)
    return dict(zip(units, shares.tolist(), strict=True))


def _forgetting(seen: Mapping[str, Outlook]) -> float:
    """Probability that the model forgets, which is that of each of its domains."""
    return next((one.forecast.forgets for one in seen.values() if one.forecast is not None), 0.0)


def _words(seen: Mapping[str, Outlook]) -> str:
    return ", ".join(
        f"{unit} {outlook.state} ({outlook.monitor.confidence:.0%})" for unit, outlook in seen.items()
    )


def _detail(outlook: Outlook) -> dict[str, object]:
    monitor = outlook.monitor
    return {
        "state": outlook.state,
        "confidence": round(monitor.confidence, 4),
        "knee_tokens": None if monitor.knee is None else round(monitor.knee.tokens),
        "reason": monitor.reason,
    }
