"""What more tokens of each domain would bring, and how the tokens that are left are best divided by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.stats.saturation import LEAST_POINTS, Saturation, saturation
from megatron_davinci.train.policies.situation import Evaluation

CHUNKS = 60
"""The tokens that are left are handed out in so many parts."""
_REPETITION = 15.387756  # R_D of the data-constrained law (Muennighoff et al., 2023, arXiv 2305.16264)
_POSITIONS = 32


@dataclass(frozen=True)
class Outlook:
    """What a unit's own trajectory says.

    Attributes:
        tokens: That it has given, of any epoch.
        monitor: Of its held-out loss against its own tokens.
        points: Evaluations that this rests on.
    """

    tokens: float
    monitor: Saturation
    points: int

    @property
    def is_known(self) -> bool:
        """Whether its returns can be told; after twice the fewest evaluations, no growth is an answer too."""
        return self.monitor.state != "unknown" or self.points >= 2 * LEAST_POINTS

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


def look(evaluations: Sequence[Evaluation], unit: str, pool: int = 0) -> Outlook:
    """The outlook of a unit, from its held-out loss against what the tokens that it gave are worth.

    Args:
        evaluations: Of the run.
        unit: The domain or source.
        pool: Its tokens; 0 for no end.

    Raises:
        DataError: A loss is not finite.
    """
    tokens: list[float] = []
    losses: list[float] = []
    for evaluation in evaluations:
        if unit not in evaluation.heldout:
            continue
        given = evaluation.unit_tokens.get(unit, 0)
        if given > (tokens[-1] if tokens else 0):
            tokens.append(given)
            losses.append(evaluation.heldout[unit])
    monitor = saturation(
        worth(np.array(tokens), pool),
        losses,
        better="lower",
        what=f"held-out loss of {unit}",
        positions=_POSITIONS,
    )
    return Outlook(tokens[-1] if tokens else 0, monitor, len(tokens))


def divide(
    outlooks: Mapping[str, Outlook],
    tokens_left: float,
    importance: Mapping[str, float],
    pools: Mapping[str, int],
) -> dict[str, float]:
    """Shares of the tokens that are left which gain most by the fitted curves.

    Tokens are handed out in parts, each to the domain with the largest return; with returns that fall, that is the
    optimum. Returns of repeated tokens fade as in the data-constrained law.

    Args:
        outlooks: By unit.
        tokens_left: To divide.
        importance: What a nat counts for; 1 where missing.
        pools: Tokens that there are; without a limit where missing.

    Returns:
        Share by unit; sums to 1.
    """
    names = sorted(outlooks)
    part = tokens_left / CHUNKS
    returns = np.stack(
        [importance.get(name, 1.0) * _marginal(outlooks[name], part, pools.get(name, 0)) for name in names]
    )
    taken = np.zeros(len(names), dtype=int)
    for _ in range(CHUNKS):
        taken[int(np.argmax(returns[np.arange(len(names)), np.minimum(taken, CHUNKS - 1)]))] += 1
    if not returns.max() > 0:
        return dict.fromkeys(names, 1 / len(names))
    return {name: float(count / CHUNKS) for name, count in zip(names, taken, strict=True)}


def _marginal(outlook: Outlook, part: float, pool: int) -> NDArray:
    """[CHUNKS] what each further part would bring, never rising."""
    forecast = outlook.monitor.forecast
    if forecast is None:
        return np.zeros(CHUNKS)
    given = worth(outlook.tokens + part * np.arange(1, CHUNKS + 1), pool)
    gained = np.diff(forecast.improvement(given), prepend=0.0)
    return np.minimum.accumulate(np.maximum(gained, 0.0))
