"""Simulated worlds of domains with known learning curves, where the optimum can be computed.

Knees, noise and the number of evaluations were set while the policies were made, from what a curve fitted to so many
evaluations can know; a noisier world leaves a controller less.

A world has 3 to 5 domains. What domain i knows is D_i: its own tokens, plus 0 to 3% of each other domain's
(transfer). Repeated tokens fade by the data-constrained law; half of the pools hold 10% to 50% of the budget, the
others all of it. Held-out loss is E_i + A_i (1 + D_i / s_i)^-b_i, with A in 0.5 to 3 nats, b in 0.15 to 0.6, s in
0.5% to 5% of the budget; in half of the domains, growth against log-tokens falls to a tenth at a knee, at 2% to 12%
of the budget (the report: general text near 1T of 8T). There are 100 evaluations, equally far apart (the report:
110), with AR(1) noise of 0.1% to 0.4% of the fall (0.0005 to 0.012 nats) and outliers (as in
benchmarks/saturation.py). The goal is the mean of the final losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

EVALUATIONS = 100
TOTAL = 10**9
FLOOR, CEILING, CHANGE = Fraction(2, 100), Fraction(8, 10), Fraction(1, 10)
REPETITION = 15.387756
SCHEDULE = 10
"""Mixtures of an optimal schedule where order counts."""


@dataclass(frozen=True)
class World:
    """Domains with known curves; arrays are by domain, tokens in shares of the budget."""

    names: tuple[str, ...]
    floor: NDArray
    height: NDArray
    scale: NDArray
    exponent: NDArray
    knee: NDArray
    transfer: NDArray
    pool: NDArray
    deviation: float
    fading: float = 0.0

    def losses(self, known: NDArray) -> NDArray:
        """[..., domains] true loss where [..., domains] is known."""
        knee = np.minimum(self.knee, 1e9)
        known = np.where(known > knee, knee * (np.maximum(known, 1e-12) / knee) ** 0.1, known)
        return self.floor + self.height * (1 + known / self.scale) ** -self.exponent

    def worth(self, seen: NDArray) -> NDArray:
        """[..., domains] what tokens seen are worth in fresh ones."""
        repeated = np.maximum(seen / self.pool - 1, 0)
        return np.minimum(seen, self.pool) - self.pool * REPETITION * np.expm1(-repeated / REPETITION)

    def further(self, known: NDArray, seen: NDArray, shares: NDArray, part: float) -> tuple[NDArray, NDArray]:
        """What is known and what was seen after `part` of the budget at some shares; [..., domains] each."""
        then = seen + shares * part
        learnt = (self.worth(then) - self.worth(seen)) @ self.transfer.T
        return known * np.exp(-self.fading * (1 - shares) * part) + learnt, then

    def goal(self, schedule: NDArray) -> NDArray:
        """[...] what is to be small, after [..., mixtures, domains] for equally many tokens each."""
        steps = schedule.shape[-2]
        finer = 1 if not self.fading else EVALUATIONS // steps
        known = seen = np.zeros(schedule.shape[:-2] + schedule.shape[-1:])
        for step in range(steps):
            for _ in range(finer):
                known, seen = self.further(known, seen, schedule[..., step, :], 1 / steps / finer)
        return self.losses(known).mean(axis=-1)


def draw(rng: np.random.Generator) -> World:
    """A world by the rules."""
    count = int(rng.integers(3, 6))
    knees = np.where(rng.random(count) < 0.5, rng.uniform(0.02, 0.12, count), np.inf)
    transfer = rng.uniform(0, 0.03, (count, count))
    np.fill_diagonal(transfer, 1)
    return World(
        names=tuple(f"domain{i}" for i in range(count)),
        floor=rng.uniform(1, 2, count),
        height=rng.uniform(0.5, 3, count),
        scale=np.exp(rng.uniform(np.log(0.005), np.log(0.05), count)),
        exponent=rng.uniform(0.15, 0.6, count),
        knee=knees,
        transfer=transfer,
        pool=np.where(rng.random(count) < 0.5, rng.uniform(0.1, 0.5, count), 1.0),
        deviation=float(rng.uniform(0.001, 0.004)),
    )


def fixed_mixtures(world: World, rng: np.random.Generator) -> dict[str, NDArray]:
    """Those that nobody needs to know the curves for."""
    count = len(world.names)
    skewed = rng.permutation(np.array([0.55, *(np.array([0.3, 0.12, 0.1, 0.08])[: count - 1])]))
    found = {
        "even": np.full(count, 1 / count),
        "pools": world.pool / world.pool.sum(),
        "skewed": skewed / skewed.sum(),
    }
    clipped = {name: np.clip(m, float(FLOOR), float(CEILING)) for name, m in found.items()}
    return {name: m / m.sum() for name, m in clipped.items()}


def optimum(world: World, schedule: NDArray) -> NDArray:
    """The best [mixtures, domains], by exchange between pairs of domains in one mixture, in ever smaller parts."""
    steps, count = schedule.shape
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    moves = np.zeros((steps * len(pairs), steps, count))
    for number, (step, (i, j)) in enumerate((s, p) for s in range(steps) for p in pairs):
        moves[number, step, i], moves[number, step, j] = 1, -1
    best, part = float(world.goal(schedule)), 0.1
    least = 1e-6 if steps == 1 else 2e-3
    while part > least:
        trials = schedule + part * moves
        may = ((trials >= float(FLOOR)) & (trials <= float(CEILING))).all(axis=(1, 2))
        goals = np.where(may, world.goal(np.maximum(trials, 0)), np.inf)
        if goals.min() < best - 1e-12:
            best, schedule = float(goals.min()), trials[int(np.argmin(goals))]
        else:
            part /= 2
    return schedule
