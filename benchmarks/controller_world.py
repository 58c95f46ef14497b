"""How near a controller comes to the optimum in simulated worlds, where the optimum can be computed.

Worlds are those of benchmarks/worlds.py. Floors 0.02, ceilings 0.8, at most 0.1 a decision; a decision at every
evaluation, as by default, and once more at every second one.

Fixed mixtures, chosen without knowing the curves: even shares; shares by pool size; one domain at 55% and the
others as the report's ratio. The optimum is the best division of all tokens within floors and ceilings, on the true
curves, without noise and without a limit on change: a convex program, solved by exchange between pairs. In these
worlds loss depends on what was seen and not on its order, so that a fixed mixture that knew the curves would be the
optimum; the best fixed mixture is the best of the three that do not.

There are three sets of worlds. In the first, curves go on as they were measured: the optimum is what somebody can
reach who knows the curves, and what is missing to 1 is the price of learning them from noisy evaluations, and of
knees that might have come.

In the second, the same worlds have knees. There the optimum knows every knee before it is reached, which no
controller can. So there is another reference, of the same bounds: `knows_curves` divides by the true curves, without
noise, from the second evaluation on, and knows a knee from the moment that it is passed. What it lacks to 1 is the
price of not knowing knees ahead: after one, floors and transfer go on giving, and shares fall by 0.1 a decision.
`knows_knees` is told them too, as the optimum is: what it lacks to 1 is the price of the bounds.

In worlds that fade (the third set) order counts: of what a domain knows, exp(-f (1 - share)) is left after a whole
run, with f in 0.1 to 0.5. Their optimum is the best schedule of ten mixtures, by the same exchange from the best
constant one, so it may be a local one.

figures, over worlds: gain_fraction_of_optimum (summed over worlds: nats below the best fixed mixture, controller /
optimum), its 95% interval by resampling worlds (_low, _high), gain_fraction_median, gain_fraction_worst,
beats_best_fixed_fraction; with_knees_* (of the worlds with knees), with_knees_every_second_* (decisions at every
second evaluation), with_knees_*_gain_fraction (the references, and loss_weighted with a reference trained on even
shares), with_knees_gain_fraction_of_knows_curves (controller / that reference), fading_* (worlds that fade),
bounds_violations (of all runs), decision_seconds_30_domains (median of 3, 100 evaluations, on one core). The
saturation monitor is left out but for the last: without a domain of another format it only words what was decided.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from saturation import noise
from worlds import CEILING, CHANGE, EVALUATIONS, FLOOR, SCHEDULE, TOTAL, World, draw, fixed_mixtures, optimum

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.stats.saturation import Saturation
from megatron_davinci.train.policies import make_policy, returns
from megatron_davinci.train.policies.bounded import decide
from megatron_davinci.train.policies.saturation import largest_first
from megatron_davinci.train.policies.situation import Bounds, Evaluation, Policy, Situation, Wish


class KnowsCurves:
    """Divides by the true curves; of knees it knows those that were passed, or all of them."""

    reads_training_loss = False

    def __init__(self, world: World, ahead: bool = False) -> None:
        self._world, self._ahead = world, ahead

    def wish(self, situation: Situation) -> Wish:
        """As `Policy.wish`."""
        world, last = self._world, situation.last
        seen = np.array([last.unit_tokens[name] for name in world.names]) / TOTAL
        told = self._ahead | (world.worth(seen) @ world.transfer.T > world.knee)
        believed = replace(world, knee=np.where(told, world.knee, np.inf))
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
    """A policy of the product, or a reference."""
    if name in ("knows_curves", "knows_knees"):
        return KnowsCurves(world, ahead=name == "knows_knees")
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
    "knows_knees": ("knows_knees", 1),
    "loss_weighted": ("loss_weighted", 1),
}


def without_words(own: NDArray, losses: NDArray, unit: str) -> Saturation:
    """In place of the monitor: with no domain of another format its states are words that move no share."""
    return Saturation("unknown", 0.0, 0.0, 0.0, 0.0, 0.0, None, losses, "not asked")


KINDS = {"world": "", "world with knees": "with_knees_", "world that fades": "fading_"}
"""Sets of worlds, and what the names of their figures begin with."""


def compare(seed: int, number: int, kind: str, runs: tuple[str, ...]) -> dict[str, float]:
    """What can be gained in one world, what each run gained, and how often bounds were left."""
    returns._monitor = without_words
    fades = kind == "world that fades"
    rng = np.random.default_rng([seed, number, int(fades)])
    world = draw(rng)
    if kind == "world":
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
        if kind != "world with knees" and name != "saturation":
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
    parser.add_argument("--worlds-with-knees", type=int, default=24)
    parser.add_argument("--fading-worlds", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=sorted(RUNS), default=list(RUNS), help="only these")
    parser.add_argument("--no-timing", action="store_true", help="decisions are not timed: on a busy machine")
    arguments = parser.parse_args()
    runs = tuple(dict.fromkeys(["saturation", *arguments.runs]))
    counts = (arguments.worlds, arguments.worlds_with_knees, arguments.fading_worlds)
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
    plain, kneed, fading = rows.values()
    figures = {}
    for kind, prefix in KINDS.items():
        if rows[kind]:
            figures |= summary(rows[kind], "saturation", prefix)
    figures["bounds_violations"] = sum(row["violations"] for found in rows.values() for row in found)
    if kneed:
        total = sum(row["possible"] for row in kneed)
        for name in ("knows_curves", "every_second_knows_curves", "knows_knees", "loss_weighted"):
            if name in runs:
                figures[f"with_knees_{name}_gain_fraction"] = sum(row[name] for row in kneed) / total
        if "knows_curves" in runs:
            figures["with_knees_gain_fraction_of_knows_curves"] = sum(
                row["saturation"] for row in kneed
            ) / sum(row["knows_curves"] for row in kneed)
        if "every_second" in runs:
            figures |= summary(kneed, "every_second", "with_knees_every_second_")
        figures["with_knees_nats_to_gain_mean"] = total / len(kneed)
    if fading:
        figures["fading_best_constant_gain_fraction"] = sum(row["constant"] for row in fading) / sum(
            row["possible"] for row in fading
        )
    figures["nats_to_gain_mean"] = float(np.mean([row["possible"] for row in plain]))
    if not arguments.no_timing:
        figures["decision_seconds_30_domains"] = decision_seconds()
    common.write(
        arguments.json,
        figures,
        {
            "worlds": arguments.worlds,
            "worlds_with_knees": arguments.worlds_with_knees,
            "fading_worlds": arguments.fading_worlds,
            "seed": arguments.seed,
            "runs": list(runs),
            "fractions": [row["saturation"] / row["possible"] for row in plain],
            "with_knees_fractions": [row["saturation"] / row["possible"] for row in kneed],
            "with_knees_knows_curves_fractions": [
                row["knows_curves"] / row["possible"] for row in kneed if "knows_curves" in row
            ],
        },
    )


if __name__ == "__main__":
    main()
