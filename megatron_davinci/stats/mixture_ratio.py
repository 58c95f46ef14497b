"""The critical mixture ratio of continued training: the largest share of new data that general loss bears.

Gu et al. (2024, arXiv 2407.17467): short runs with several shares R; of each, the change of general loss since the
start follows a sum of power laws of tokens, and that of the new domain one. A share is feasible where general loss,
drawn on to the tokens meant, has risen by no more than a tolerance, and the domain's has fallen; the critical ratio
is the largest feasible one. Here each change is `b + a T^s` (for general loss `b + a T^s + c T^r`), with every
exponent of a grid weighed by its probability and the coefficients integrated out, so that what is drawn on has an
interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import DataError

TOLERANCE = 0.05
"""Nats that general loss may rise (the paper's)."""
LEAST_POINTS = 6
LEAST_SHARES = 3
_EXPONENTS = np.array([-1.0, -0.6, -0.3, -0.1, 0.1, 0.25, 0.4])
_DRAWS = 2000
_SPREAD = 1.0
"""Of coefficients, in units of the largest change: flat beyond what a change of this size needs."""


@dataclass(frozen=True)
class CriticalRatio:
    """What short runs say of a goal.

    Attributes:
        ratio: The critical ratio; None where no share that was run is feasible.
        low: Lower end of its 95% interval; 0 where none may be feasible.
        high: Upper end; at most the largest share that was run.
        feasible: By share: the probability that it is feasible.
        general: By share: change of general loss at the goal, with its 95% interval.
        domain: By share: change of the domain's loss there, likewise.
    """

    ratio: float | None
    low: float
    high: float
    feasible: dict[float, float]
    general: dict[float, tuple[float, float, float]]
    domain: dict[float, tuple[float, float, float]]


def critical_ratio(
    runs: Mapping[float, tuple[NDArray, NDArray, NDArray]],
    goal: float,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    what: str = "mixture ratio",
) -> CriticalRatio:
    """Draw short runs on to a goal.

    Args:
        runs: By share of the domain, of samples: [n] tokens since the start, [n] change of general loss, [n] change
            of the domain's.
        goal: Tokens that the share is wanted for.
        tolerance: Nats that general loss may rise.
        seed: Of the draws.
        what: Names the runs in errors.

    Raises:
        DataError: Fewer than three shares or six evaluations of one, or values that are not finite.
    """
    if len(runs) < LEAST_SHARES:
        raise DataError(
            "Too few shares for a critical ratio.",
            where=what,
            found=f"{sorted(runs)}",
            expected=f"{LEAST_SHARES} or more",
        )
    rng = np.random.default_rng(seed)
    shares = sorted(runs)
    general, domain = [], []
    for share in shares:
        tokens, ours, theirs = (np.asarray(one, np.float64) for one in runs[share])
        if len(tokens) < LEAST_POINTS:
            raise DataError(
                "A share needs evaluations on the way.",
                where=f"{what}, share {share:g}",
                found=f"{len(tokens)} evaluations",
                expected=f"{LEAST_POINTS} or more after the start",
                do="evaluate more often (evaluation.every_steps)",
            )
        if not all(np.isfinite(one).all() for one in (tokens, ours, theirs)):
            raise DataError(
                "A loss is no number, so nothing can be drawn on from it.",
                where=f"{what}, share {share:g}",
                found="NaN or infinity in an evaluation",
                expected="finite losses",
                do="leave out the arm that diverged, or mend its run",
            )
        general.append(_drawn_on(tokens, ours, goal, 2, rng))
        domain.append(_drawn_on(tokens, theirs, goal, 1, rng))
    g, d = np.array(general), np.array(domain)  # [shares, draws]
    possible = (g <= tolerance) & (d < 0)
    critical = np.array([_critical(shares, g[:, i], possible[:, i], tolerance) for i in range(_DRAWS)])
    low, high = np.quantile(critical, [0.025, 0.975])
    middle = float(np.median(critical))

    def interval(values: NDArray) -> tuple[float, float, float]:
        ends = np.quantile(values, [0.5, 0.025, 0.975])
        return float(ends[0]), float(ends[1]), float(ends[2])

    return CriticalRatio(
        ratio=middle if middle > 0 else None,
        low=float(low),
        high=float(high),
        feasible={share: float(one.mean()) for share, one in zip(shares, possible, strict=True)},
        general={share: interval(one) for share, one in zip(shares, g, strict=True)},
        domain={share: interval(one) for share, one in zip(shares, d, strict=True)},
    )


def _critical(shares: list[float], general: NDArray, possible: NDArray, tolerance: float) -> float:
    """The largest feasible share, drawn on to where general loss reaches the tolerance; 0 where none is."""
    there = np.flatnonzero(possible)
    if not len(there):
        return 0.0
    last = int(there[-1])
    if last + 1 == len(shares) or general[last + 1] <= tolerance:
        return shares[last]
    part = (tolerance - general[last]) / max(general[last + 1] - general[last], 1e-12)
    return shares[last] + min(part, 1.0) * (shares[last + 1] - shares[last])


def _drawn_on(tokens: NDArray, change: NDArray, goal: float, terms: int, rng: np.random.Generator) -> NDArray:
    """[draws] of a change at the goal, by curves that fit what was measured."""
    x, end = tokens / tokens[-1], goal / tokens[-1]
    unit = max(float(np.abs(change).max()), 1e-9)
    y = change / unit
    exponents: list[tuple[float, ...]] = [(s,) for s in _EXPONENTS]
    if terms == 2:
        exponents += [(s, r) for i, s in enumerate(_EXPONENTS) for r in _EXPONENTS[i + 1 :]]
    log_weight, places = [], []
    for chosen in exponents:
        # Columns that are 0 at the last evaluation: what is drawn on begins where the run is.
        columns = [np.ones_like(x), *((x**s - 1) / s for s in chosen)]
        design = np.stack(columns, axis=1)
        prior = np.diag([1e-6, *[_SPREAD**-2] * len(chosen)])
        # The prior counts as that many squared errors of the noise, which a first fit estimates.
        free = np.linalg.lstsq(design, y, rcond=None)[0]
        noise = max(float(((y - design @ free) ** 2).sum()) / max(len(y) - design.shape[1], 1), 1e-8)
        matrix = design.T @ design + noise * prior
        best = np.linalg.solve(matrix, design.T @ y)
        error = float(((y - design @ best) ** 2).sum() + noise * best @ prior @ best)
        at = np.array([1.0, *((end**s - 1) / s for s in chosen)])
        freedom = len(y) - design.shape[1]
        log_weight.append(
            -(len(y) / 2) * np.log(max(error, 1e-12))
            - np.linalg.slogdet(matrix)[1] / 2
            + len(chosen) * np.log(noise) / 2
        )
        places.append((float(at @ best), float(at @ np.linalg.solve(matrix, at)), error, max(freedom, 2)))
    weight = np.exp(np.array(log_weight) - max(log_weight))
    picked = rng.choice(len(places), _DRAWS, p=weight / weight.sum())
    mean, spread, errors, freedoms = (np.array(column) for column in zip(*places, strict=True))
    deviation = np.sqrt(errors[picked] * spread[picked] / rng.chisquare(freedoms[picked]))
    return np.asarray(unit * (mean[picked] + deviation * rng.standard_normal(_DRAWS)))
