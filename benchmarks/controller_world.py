"""How near a controller comes to the optimum in simulated worlds, where the optimum can be computed.

Rules of the worlds. Knees, noise and the number of evaluations were set while the policies were made, from what a
curve fitted to so many evaluations can know; a noisier world leaves a controller less.

A world has 3 to 5 domains. What domain i knows is D_i: its own tokens, plus 0 to 3% of each other domain's
(transfer). Repeated tokens fade by the data-constrained law; half of the pools hold 10% to 50% of the budget, the
others all of it. Held-out loss is E_i + A_i (1 + D_i / s_i)^-b_i, with A in 0.5 to 3 nats, b in 0.15 to 0.6, s in
0.5% to 5% of the budget; in half of the domains, growth against log-tokens falls to a tenth at a knee, at 2% to 12%
of the budget (the report: general text near 1T of 8T). There are 100 evaluations, equally far apart (the report:
110), with AR(1) noise of 0.1% to 0.4% of the fall (0.0005 to 0.012 nats) and outliers (as in
benchmarks/saturation.py). The goal is the mean of the final losses. Floors 0.02, ceilings 0.8, at most 0.1 a
decision; a decision at every evaluation, as by default, and once more at every second one.

Fixed mixtures, chosen without knowing the curves: even shares; shares by pool size; one domain at 55% and the
others as the report's ratio. The optimum is the best division of all tokens within floors and ceilings, on the true
curves, without noise and without a limit on change: a convex program, solved by exchange between pairs. In these
worlds loss depends on what was seen and not on its order, so that a fixed mixture that knew the curves would be the
optimum; the best fixed mixture is the best of the three that do not.

The optimum knows every knee before it is reached, which no controller can. So there is a second reference, of the
same bounds: `knows_curves` divides by the true curves, without noise, from the second evaluation on, and knows a
knee from the moment that it is passed. What it lacks to 1 is the price of not knowing knees ahead: after one, floors
and transfer go on giving, and shares fall by 0.1 a decision.

The same worlds without their knees (a second set) are those in which the curves that were measured go on: what is
missing to 1 there is the price of learning curves from noisy evaluations, and of knees that might have come.

In worlds that fade (a third set) order counts: of what a domain knows, exp(-f (1 - share)) is left after a whole
run, with f in 0.1 to 0.5. Their optimum is the best schedule of ten mixtures, by the same exchange from the best
constant one, so it may be a local one.

figures, over worlds: gain_fraction_of_optimum (summed over worlds: nats below the best fixed mixture, controller /
optimum), its 95% interval by resampling worlds (_low, _high), gain_fraction_median, gain_fraction_worst,
beats_best_fixed_fraction, bounds_violations (of all runs), knows_curves_gain_fraction, every_second_* (decisions at
every second evaluation), without_knees_* (the same worlds without knees), fading_* (worlds that fade),
loss_weighted_gain_fraction (that policy, with a reference
trained on even shares), decision_seconds_30_domains (median of 3, 100 evaluations, on one core). The saturation
monitor is left out but for the last: without a domain of another format it only words what was decided.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from saturation import noise

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.stats.saturation import Saturation
from megatron_davinci.train.policies import make_policy, returns
from megatron_davinci.train.policies.bounded import decide
from megatron_davinci.train.policies.saturation import largest_first
from megatron_davinci.train.policies.situation import Bounds, Evaluation, Policy, Situation, Wish

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


class KnowsCurves:
    """Divides by the true curves; of knees it knows those that were passed."""

    reads_training_loss = False

    def __init__(self, world: World) -> None:
        self._world = world

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        world, last = self._world, situation.last
        seen = np.array([last.unit_tokens[name] for name in world.names]) / TOTAL
        passed = world.worth(seen) @ world.transfer.T > world.knee
        believed = replace(world, knee=np.where(passed, world.knee, np.inf))
        left = 1 - last.tokens / TOTAL
        if len(situation.evaluations) < 2 or left <= 0:
            return Wish(situation.kept(), "waits")
        shares, part = np.array(list(situation.kept().values())), 0.1
        pairs = np.eye(len(seen))[:, None] - np.eye(len(seen))
        moves = pairs.reshape(-1, len(seen))[np.abs(pairs).sum(-1).ravel() > 0]

        def goal(trials: NDArray) -> NDArray:
            known = believed.worth(seen + left * np.maximum(trials, 0)) @ world.transfer.T
            return believed.losses(known).mean(axis=-1)

        best = float(goal(shares))
        while part > 1e-3:
            trials = shares + part * moves
            may = ((trials >= float(FLOOR) - 1e-9) & (trials <= float(CEILING) + 1e-9)).all(axis=-1)
            goals = np.where(may, goal(trials), np.inf)
            if goals.min() < best - 1e-12:
                best, shares = float(goals.min()), trials[int(np.argmin(goals))]
            else:
                part /= 2
        planned = dict(zip(world.names, shares.tolist(), strict=True))
        return Wish(largest_first(planned, situation), "by the true curves")


def policy_named(name: str, world: World) -> Policy:
    """A policy of the product, or the reference."""
    if name == "knows_curves":
        return KnowsCurves(world)
    others: dict[str, Any] = {}
    if name == "loss_weighted":
        # A reference trained on even shares.
        even = np.full(len(world.names), 1 / len(world.names))
        reference = world.losses(world.worth(even) @ world.transfer.T)
        others = {"loss_weighted": {"reference": dict(zip(world.names, reference.tolist(), strict=True))}}
    return make_policy(ControllerConfig.model_validate({"mode": "apply", "policy": name, **others}))


def run(world: World, policy: Policy, every: int, rng: np.random.Generator) -> tuple[float, int]:
    """One run under a policy, from even shares: the goal at its end, and how often bounds were left."""
    names = world.names
    bounds = Bounds(dict.fromkeys(names, FLOOR), dict.fromkeys(names, CEILING), CHANGE)
    mixture = dict.fromkeys(names, Fraction(10**6 // len(names), 10**6))
    mixture[names[0]] += 1 - sum(mixture.values())
    noises = np.stack([noise(rng, EVALUATIONS, world.deviation * height) for height in world.height], axis=1)
    pools = dict(zip(names, (world.pool * TOTAL).astype(int).tolist(), strict=True))
    known = seen = np.zeros(len(names))
    evaluations: list[Evaluation] = []
    violations = 0
    for i in range(EVALUATIONS):
        shares = np.array([float(mixture[name]) for name in names])
        known, seen = world.further(known, seen, shares, 1 / EVALUATIONS)
        evaluations.append(
            Evaluation(
                step=i + 1,
                tokens=TOTAL * (i + 1) // EVALUATIONS,
                unit_tokens=dict(zip(names, (seen * TOTAL).astype(int).tolist(), strict=True)),
                heldout=dict(zip(names, (world.losses(known) + noises[i]).tolist(), strict=True)),
            )
        )
        if (i + 1) % every:
            continue
        decided = decide(policy, Situation(tuple(evaluations), mixture, bounds, TOTAL, pools)).mixture
        violations += sum(not FLOOR <= share <= CEILING for share in decided.values())
        violations += sum(abs(decided[name] - mixture[name]) > CHANGE for name in names)
        violations += sum(decided.values()) != 1
        mixture = dict(decided)
    return float(world.losses(known).mean()), violations


RUNS = {
    "saturation": ("saturation", 1),
    "every_second": ("saturation", 2),
    "knows_curves": ("knows_curves", 1),
    "every_second_knows_curves": ("knows_curves", 2),
    "loss_weighted": ("loss_weighted", 1),
}


def without_words(own: NDArray, losses: NDArray, unit: str) -> Saturation:
    """In place of the monitor: with no domain of another format its states are words that move no share."""
    return Saturation("unknown", 0.0, 0.0, 0.0, 0.0, 0.0, None, losses, "not asked")


KINDS = {"world": "", "world without knees": "without_knees_", "world that fades": "fading_"}
"""Sets of worlds, and what the names of their figures begin with."""


def compare(seed: int, number: int, kind: str, runs: tuple[str, ...]) -> dict[str, float]:
    """What can be gained in one world, what each run gained, and how often bounds were left."""
    returns._monitor = without_words
    fades = kind == "world that fades"
    rng = np.random.default_rng([seed, number, int(fades)])
    world = draw(rng)
    if kind == "world without knees":
        world = replace(world, knee=np.full_like(world.knee, np.inf))
    fixed = fixed_mixtures(world, rng)
    noise_seed = int(rng.integers(2**32))  # the same noise for every policy
    best_static = optimum(world, fixed["even"][None])
    if fades:
        world = replace(world, fading=float(rng.uniform(0.1, 0.5)))
        best_static = optimum(world, fixed["even"][None])
        best = float(world.goal(optimum(world, np.repeat(best_static, SCHEDULE, axis=0))))
    else:
        best = float(world.goal(best_static))
    best_fixed = min(float(world.goal(mixture[None])) for mixture in fixed.values())
    found = {"possible": best_fixed - best, "domains": float(len(world.names)), "violations": 0.0}
    if fades:
        found["constant"] = best_fixed - float(world.goal(best_static))
    for name in runs:
        policy, every = RUNS[name]
        if kind != "world" and name != "saturation":
            continue
        end, left = run(world, policy_named(policy, world), every, np.random.default_rng(noise_seed))
        found[name] = best_fixed - end
        found["violations"] += left
    return found


def interval(gained: NDArray, possible: NDArray, rng: np.random.Generator) -> tuple[float, float]:
    """95% interval of the summed fraction, by resampling worlds."""
    chosen = rng.integers(0, len(gained), (4000, len(gained)))
    low, high = np.quantile(gained[chosen].sum(axis=1) / possible[chosen].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def summary(rows: list[dict[str, float]], run_name: str, prefix: str) -> dict[str, float]:
    """The figures of one kind of run."""
    gained, possible = (np.array([row[key] for row in rows]) for key in (run_name, "possible"))
    low, high = interval(gained, possible, np.random.default_rng(0))
    return {
        f"{prefix}gain_fraction_of_optimum": float(gained.sum() / possible.sum()),
        f"{prefix}gain_fraction_low": low,
        f"{prefix}gain_fraction_high": high,
        f"{prefix}gain_fraction_median": float(np.median(gained / possible)),
        f"{prefix}gain_fraction_worst": float((gained / possible).min()),
        f"{prefix}beats_best_fixed_fraction": float(np.mean(gained > 0)),
    }


def decision_seconds(count: int = 30) -> float:
    """Of one decision for so many domains after 100 evaluations."""
    rng = np.random.default_rng(0)
    names = tuple(f"domain{i:02d}" for i in range(count))
    scales = rng.uniform(0.001, 0.02, count)
    seen = np.arange(1, EVALUATIONS + 1)[:, None] / EVALUATIONS / count
    losses = 1.5 + 2 * (1 + seen / scales) ** -0.3 + rng.normal(0, 0.004, (EVALUATIONS, count))
    evaluations = tuple(
        Evaluation(
            i + 1,
            TOTAL // 2 * (i + 1) // EVALUATIONS,
            dict.fromkeys(names, int(seen[i, 0] * TOTAL) // 2),
            dict(zip(names, losses[i].tolist(), strict=True)),
        )
        for i in range(EVALUATIONS)
    )
    mixture = dict.fromkeys(names, Fraction(10**6 // count, 10**6))
    mixture[names[0]] += 1 - sum(mixture.values())
    situation = Situation(evaluations, mixture, Bounds({}, {}, CHANGE), TOTAL)
    policy = make_policy(ControllerConfig.model_validate({"mode": "apply", "policy": "saturation"}))
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        decide(policy, situation)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def main() -> None:
    """Draw worlds, run, compare."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--worlds", type=int, default=24)
    parser.add_argument("--worlds-without-knees", type=int, default=24)
    parser.add_argument("--fading-worlds", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=sorted(RUNS), default=list(RUNS), help="only these")
    parser.add_argument("--no-timing", action="store_true", help="decisions are not timed: on a busy machine")
    arguments = parser.parse_args()
    runs = tuple(dict.fromkeys(["saturation", *arguments.runs]))
    counts = (arguments.worlds, arguments.worlds_without_knees, arguments.fading_worlds)
    jobs = [
        (arguments.seed, i, kind, runs)
        for kind, count in zip(KINDS, counts, strict=True)
        for i in range(count)
    ]
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with ProcessPoolExecutor(arguments.processes) as pool:
        for (_, number, kind, _), row in zip(jobs, pool.map(compare, *zip(*jobs, strict=True)), strict=True):
            rows[kind].append(row)
            words = ", ".join(
                f"{name} {row[name] / row['possible']:.3f}" for name in (*RUNS, "constant") if name in row
            )
            print(
                f"{kind} {number}: {row['domains']:.0f} domains, to gain {row['possible']:.4f} nats; {words}",
                flush=True,
            )
    plain, _, fading = rows.values()
    total = sum(row["possible"] for row in plain)
    figures = summary(plain, "saturation", "")
    figures["bounds_violations"] = sum(row["violations"] for found in rows.values() for row in found)
    for name in ("knows_curves", "every_second_knows_curves", "loss_weighted"):
        if name in runs:
            figures[f"{name}_gain_fraction"] = sum(row[name] for row in plain) / total
    if "knows_curves" in runs:
        figures["gain_fraction_of_knows_curves"] = sum(row["saturation"] for row in plain) / sum(
            row["knows_curves"] for row in plain
        )
    if "every_second" in runs:
        figures |= summary(plain, "every_second", "every_second_")
    for kind, prefix in KINDS.items():
        if prefix and rows[kind]:
            figures |= summary(rows[kind], "saturation", prefix)
    if fading:
        figures["fading_best_constant_gain_fraction"] = sum(row["constant"] for row in fading) / sum(
            row["possible"] for row in fading
        )
    figures["nats_to_gain_mean"] = total / len(plain)
    if not arguments.no_timing:
        figures["decision_seconds_30_domains"] = decision_seconds()
    common.write(
        arguments.json,
        figures,
        {
            "worlds": arguments.worlds,
            "worlds_without_knees": arguments.worlds_without_knees,
            "fading_worlds": arguments.fading_worlds,
            "seed": arguments.seed,
            "runs": list(runs),
            "fractions": [row["saturation"] / row["possible"] for row in plain],
            "knows_curves_fractions": [
                row["knows_curves"] / row["possible"] for row in plain if "knows_curves" in row
            ],
        },
    )


if __name__ == "__main__":
    main()
