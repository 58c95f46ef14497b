"""How near a controller comes to the optimum in simulated worlds, where the optimum can be computed.

Rules of the worlds. Knees, noise and the number of evaluations were set while the policies were made, from what a
curve fitted to so many evaluations can know; a noisier world leaves a controller less.

A world has 3 to 5 domains. What domain i knows is D_i: its own tokens, plus 0 to 3% of each other domain's
(transfer). Repeated tokens fade by the data-constrained law; half of the pools hold 10% to 50% of the budget, the
others all of it. Held-out loss is E_i + A_i (1 + D_i / s_i)^-b_i, with A in 0.5 to 3 nats, b in 0.15 to 0.6, s in
0.5% to 5% of the budget; in half of the domains, growth against log-tokens falls to a tenth at a knee, at 2% to 12%
of the budget (the report: general text near 1T of 8T). There are 100 evaluations, equally far apart (the report:
110), a decision at every second, with AR(1) noise of 0.1% to 0.4% of the fall (0.0005 to 0.012 nats) and outliers
(as in benchmarks/saturation.py). The goal is the mean of the final losses. Floors 0.02, ceilings 0.8, at most 0.1 a
decision.

Fixed mixtures, chosen without knowing the curves: even shares; shares by pool size; one domain at 55% and the
others as the report's ratio. The optimum is the best division of all tokens within floors and ceilings, on the true
curves, without noise and without a limit on change: a convex program, solved by exchange between pairs. In these
worlds loss depends on what was seen and not on its order, so that a fixed mixture that knew the curves would be the
optimum; the best fixed mixture is the best of the three that do not.

figures: gain_fraction_of_optimum (summed over worlds: nats below the best fixed mixture, controller / optimum),
gain_fraction_median, gain_fraction_worst, beats_best_fixed_fraction, bounds_violations,
loss_weighted_gain_fraction (that policy, with a reference trained on even shares)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from saturation import noise

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies import make_policy
from megatron_davinci.train.policies.bounded import decide
from megatron_davinci.train.policies.situation import Bounds, Evaluation, Situation

EVALUATIONS, EVERY = 100, 2
TOTAL = 10**9
FLOOR, CEILING, CHANGE = Fraction(2, 100), Fraction(8, 10), Fraction(1, 10)
REPETITION = 15.387756


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

    def losses(self, seen: NDArray) -> NDArray:
        """[..., domains] true loss after [..., domains] tokens."""
        repeated = np.maximum(seen / self.pool - 1, 0)
        fresh = np.minimum(seen, self.pool)
        worth = fresh + self.pool * REPETITION * -np.expm1(-repeated / REPETITION)
        known = worth @ self.transfer.T
        known = np.where(
            known > self.knee, np.minimum(self.knee, 1e9) * (known / np.minimum(self.knee, 1e9)) ** 0.1, known
        )
        return self.floor + self.height * (1 + known / self.scale) ** -self.exponent

    def goal(self, seen: NDArray) -> NDArray:
        """[...] what is to be small."""
        return self.losses(seen).mean(axis=-1)


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
    return {name: np.clip(m, float(FLOOR), float(CEILING)) for name, m in found.items()}


def optimum(goal: Callable[[NDArray], Any], count: int) -> NDArray:
    """The best division of all tokens: exchange between pairs, in ever smaller parts."""
    seen = np.full(count, 1 / count)
    part = 0.1
    while part > 1e-6:
        trials = []
        for i in range(count):
            for j in range(count):
                moved = seen.copy()
                moved[i] += part
                moved[j] -= part
                if i != j and moved[i] <= float(CEILING) and moved[j] >= float(FLOOR):
                    trials.append(moved)
        best = min(trials, key=lambda trial: float(goal(trial)), default=seen)
        if float(goal(best)) < float(goal(seen)) - 1e-12:
            seen = best
        else:
            part /= 2
    return seen


def run(
    world: World, policy_name: str, start: NDArray, rng: np.random.Generator
) -> tuple[NDArray, int, list[NDArray]]:
    """One run under a policy: what was seen, how often bounds were left, the mixtures."""
    names = world.names
    others: dict[str, Any] = {}
    if policy_name == "loss_weighted":
        # A reference trained on even shares.
        reference = world.losses(np.full(len(names), 1 / len(names)))
        others = {"loss_weighted": {"reference": dict(zip(names, reference.tolist(), strict=True))}}
    policy = make_policy(ControllerConfig.model_validate({"mode": "apply", "policy": policy_name, **others}))
    bounds = Bounds(dict.fromkeys(names, FLOOR), dict.fromkeys(names, CEILING), CHANGE)
    mixture = {name: Fraction(round(share * 10**6), 10**6) for name, share in zip(names, start, strict=True)}
    mixture[names[0]] += 1 - sum(mixture.values())
    noises = np.stack([noise(rng, EVALUATIONS, world.deviation * height) for height in world.height], axis=1)
    seen, evaluations, violations, mixtures = np.zeros(len(names)), [], 0, []
    for i in range(EVALUATIONS):
        mixtures.append(np.array([float(mixture[name]) for name in names]))
        seen = seen + mixtures[-1] / EVALUATIONS
        measured = world.losses(seen) + noises[i]
        evaluations.append(
            Evaluation(
                step=i + 1,
                tokens=TOTAL * (i + 1) // EVALUATIONS,
                unit_tokens=dict(zip(names, (seen * TOTAL).astype(int).tolist(), strict=True)),
                heldout=dict(zip(names, measured.tolist(), strict=True)),
            )
        )
        if (i + 1) % EVERY:
            continue
        situation = Situation(
            tuple(evaluations),
            mixture,
            bounds,
            TOTAL,
            dict(zip(names, (world.pool * TOTAL).astype(int).tolist(), strict=True)),
        )
        decided = decide(policy, situation).mixture
        violations += sum(not FLOOR <= share <= CEILING for share in decided.values())
        violations += sum(abs(decided[name] - mixture[name]) > CHANGE for name in names)
        violations += sum(decided.values()) != 1
        mixture = dict(decided)
    return seen, violations, mixtures


def main() -> None:
    """Draw worlds, run, compare."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--worlds", type=int, default=12)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    gained: dict[str, list[float]] = {"saturation": [], "loss_weighted": []}
    possible: list[float] = []
    violations = 0
    for number in range(arguments.worlds):
        world = draw(rng)
        fixed = fixed_mixtures(world, rng)
        best_fixed = min(float(world.goal(mixture / mixture.sum())) for mixture in fixed.values())
        best = float(world.goal(optimum(world.goal, len(world.names))))
        possible.append(best_fixed - best)
        words = []
        for policy, gains in gained.items():
            seen, left, _ = run(world, policy, fixed["even"], rng)
            violations += left
            gains.append(best_fixed - float(world.goal(seen)))
            words.append(f"{policy} {gains[-1] / possible[-1]:.3f}")
        print(
            f"world {number}: {len(world.names)} domains, to gain {possible[-1]:.4f} nats; {', '.join(words)}"
        )
    fractions = np.array(gained["saturation"]) / np.array(possible)
    figures = {
        "gain_fraction_of_optimum": sum(gained["saturation"]) / sum(possible),
        "gain_fraction_median": float(np.median(fractions)),
        "gain_fraction_worst": float(fractions.min()),
        "beats_best_fixed_fraction": float(np.mean(fractions > 0)),
        "loss_weighted_gain_fraction": sum(gained["loss_weighted"]) / sum(possible),
        "bounds_violations": violations,
        "nats_to_gain_mean": float(np.mean(possible)),
    }
    common.write(arguments.json, figures, {"worlds": arguments.worlds})


if __name__ == "__main__":
    main()
