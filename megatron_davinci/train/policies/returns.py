"""What more tokens of each domain would bring, and how the tokens that are left are best divided by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.stats.forecast import Forecast, condensed, forecast
from megatron_davinci.stats.saturation import LEAST_POINTS, Saturation, saturation
from megatron_davinci.train.policies.situation import Situation

PARTS = 100
"""The tokens that are left are handed out in so many parts."""
LEAST_EVALUATIONS = 6
"""Below this many evaluations nothing is divided."""
_REPETITION = 15.387756  # R_D of the data-constrained law (Muennighoff et al., 2023, arXiv 2305.16264)
_POSITIONS = 16  # where the monitor looks for a knee: a state needs few


@dataclass(frozen=True)
class Outlook:
    """What a unit's own trajectory says.

    Attributes:
        tokens: That it has given, of any epoch.
        others: That all other units have given, in what they are worth.
        points: Evaluations that this rests on.
        monitor: Of its held-out loss against its own tokens.
        forecast: Of its held-out loss; None with too few evaluations.
    """

    tokens: float
    others: float
    points: int
    monitor: Saturation
    forecast: Forecast | None

    @property
    def state(self) -> str:
        """The monitor's state; without growth above the noise after many evaluations, `saturated`."""
        return (
            "saturated" if self.monitor.state == "unknown" and self.points >= 2 * LEAST_POINTS
            else self.monitor.state
        )  # fmt: skip


def worth(tokens: NDArray, pool: int) -> NDArray:
    """What tokens are worth in fresh ones: D' of the data-constrained law; a pool of 0 has no end."""
    if not pool:
        return tokens
    repeated = np.maximum(tokens / pool - 1, 0)
    return np.minimum(tokens, pool) - pool * _REPETITION * np.expm1(-repeated / _REPETITION)


def look(situation: Situation, units: Sequence[str]) -> dict[str, Outlook]:
    """The outlook of some units, each from its held-out loss against what tokens were worth.

    Raises:
        DataError: A loss is not finite.
    """
    evaluations = situation.evaluations
    given = {
        unit: np.array([e.unit_tokens.get(unit, 0) for e in evaluations], np.float64)
        for unit in situation.mixture
    }
    worths = {unit: worth(tokens, situation.pools.get(unit, 0)) for unit, tokens in given.items()}
    total = np.sum(list(worths.values()), axis=0)
    known_rates = [e.learning_rate for e in evaluations if e.learning_rate]
    rates = np.array(known_rates) if len(known_rates) == len(evaluations) else None
    found = {}
    for unit in units:
        at = [i for i, e in enumerate(evaluations) if unit in e.heldout and given[unit][i] > 0]
        own, others = worths[unit][at], (total - worths[unit])[at]
        losses = np.array([evaluations[i].heldout[unit] for i in at])
        found[unit] = Outlook(
            tokens=float(given[unit][-1]),
            others=float(total[-1] - worths[unit][-1]),
            points=len(at),
            monitor=_monitor(own, losses, unit),
            forecast=forecast(
                own, others, losses, float(situation.total_tokens), None if rates is None else rates[at]
            )
            if len(at) >= LEAST_EVALUATIONS
            else None,
        )
    return _together(found)


def _together(outlooks: dict[str, Outlook]) -> dict[str, Outlook]:
    """The same, of one model: whether it forgets is as likely for one of its domains as for another."""
    known = [outlook.forecast.forgets for outlook in outlooks.values() if outlook.forecast is not None]
    odds = [log(max(p, 1e-9)) - log(max(1 - p, 1e-9)) for p in known]
    forgets = 1 / (1 + exp(-min(max(sum(odds), -30.0), 30.0)))
    return {
        unit: outlook
        if outlook.forecast is None
        else replace(outlook, forecast=outlook.forecast.given(forgets))
        for unit, outlook in outlooks.items()
    }


def _monitor(own: NDArray, losses: NDArray, unit: str) -> Saturation:
    rising = np.flatnonzero(np.diff(own, prepend=0.0) > 0)  # a unit with a share of 0 stays where it is
    tokens, _, values, *_ = condensed(own[rising], own[rising], losses[rising])
    return saturation(tokens, values, better="lower", what=f"held-out loss of {unit}", positions=_POSITIONS)


def divide(
    outlooks: Mapping[str, Outlook],
    tokens_left: float,
    of_all: float,
    situation: Situation,
    importance: Mapping[str, float],
) -> dict[str, float] | None:
    """Shares of the tokens that are left which are expected to gain most.

    Each unit first gets its floor. What is over is handed out in parts, each to the unit with the largest return
    that is below its ceiling; with returns that fall, that is the optimum. Repeated tokens fade as in the
    data-constrained law.

    Args:
        outlooks: By unit.
        tokens_left: To divide.
        of_all: Share of all tokens that they are.
        situation: Its bounds and pools.
        importance: What a nat counts for; 1 where missing.

    Returns:
        Share by unit; sums to 1. None where more of no unit is expected to bring anything.
    """
    names = sorted(outlooks)
    gains = np.stack(
        [
            importance.get(name, 1.0)
            * _gains(outlooks[name], tokens_left, tokens_left / of_all, situation.pools.get(name, 0))
            for name in names
        ]
    )
    if not gains.max() > 0:
        return None
    floors = np.array([float(situation.bounds.floors.get(name, 0)) for name in names]) / of_all
    ceilings = np.array([float(situation.bounds.ceilings.get(name, 1)) for name in names]) / of_all
    taken = np.floor(np.minimum(floors, 1) * PARTS + 1e-9).astype(int)
    most = np.ceil(np.minimum(ceilings, 1) * PARTS - 1e-9).astype(int)
    returns = np.minimum.accumulate(np.diff(gains, axis=1), axis=1)
    units = np.arange(len(names))
    for _ in range(PARTS - int(taken.sum())):
        further = np.where(taken < most, returns[units, np.minimum(taken, PARTS - 1)], -np.inf)
        taken[int(np.argmax(further))] += 1
    return {name: float(count / taken.sum()) for name, count in zip(names, taken, strict=True)}


def _gains(outlook: Outlook, left: float, left_of_all: float, pool: int) -> NDArray:
    """[PARTS + 1] gained after each part, while all other units get the rest."""
    if outlook.forecast is None:
        return np.zeros(PARTS + 1)
    parts = left * np.arange(PARTS + 1) / PARTS
    return outlook.forecast.gains(worth(outlook.tokens + parts, pool), outlook.others + left_of_all - parts)
