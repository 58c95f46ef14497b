"""`saturation`: share goes from domains that have saturated to those that still grow (daVinci-LLM, sections 4.2 and
4.3).

Balance first: among domains of plain text, the tokens that are left are divided by what more of each would bring, by
the curves fitted to its held-out loss. Then intensify: once all of them have saturated, share goes to the domains of
another format (questions and answers), which until then keep what they have.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies.returns import Outlook, divide, look
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
        seen = {unit: look(situation.evaluations, unit, situation.pools.get(unit, 0)) for unit in plain}
        details = {unit: _detail(outlook) for unit, outlook in seen.items()}
        waiting = [unit for unit in plain if not seen[unit].is_known]
        if waiting:
            words = "; ".join(f"{unit}: {seen[unit].monitor.reason}" for unit in waiting)
            return Wish(kept, f"not enough is known yet ({words})", details)
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
        shares = divide(seen, left, self._settings.importance, situation.pools)
        mixture = {unit: kept[unit] if unit in formats else free * shares[unit] for unit in kept}
        moves = [
            f"{unit} {kept[unit]:.1%} to {mixture[unit]:.1%}"
            for unit in plain
            if abs(mixture[unit] - kept[unit]) >= 0.001
        ]
        wished = "by returns of the tokens left: " + (", ".join(moves) or "as it is")
        return Wish(mixture, f"{_words(seen)}; {wished}", details)


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
