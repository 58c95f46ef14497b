"""How near a search of mixtures comes to the optimum in simulated worlds, beside random search at equal runs.

The worlds are those of benchmarks/worlds.py: 3 to 5 domains with known curves, transfer and pools, whose
best constant mixture can be computed. A run of a mixture gives the mean of the domains' final losses with noise of a
deviation of 0.002 nats, as the seed noise of small runs is. All begin at even shares; 16, 8, 4 runs (CLIMB's 4:2:1).

- search: three rounds, each proposed by the predictor of those before; what it proposes at the end.
- once: the same number of runs, all drawn at once around even shares, and the predictor's best (RegMix).
- random: the same runs; the mixture of the lowest measured loss.

figures: <way>_gain_fraction (of what the optimum gains on even shares, summed over worlds), <way>_worst,
    search_beats_random_fraction, gain_coverage (of the 95% interval of the gain), unwidened_coverage (had the
    predictor been believed), widened_median (by how much it was not), runs
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import common
from worlds import CEILING, FLOOR, World, draw, optimum

from megatron_davinci.stats.mixture_search import Bounds, best_mixture, propose

ROUNDS = (16, 8, 4)
NOISE = 0.002


def main() -> None:
    """Search worlds, compare."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--worlds", type=int, default=40)
    arguments = parser.parse_args()
    common.write(arguments.json, searches(arguments.worlds, arguments.seed), {"worlds": arguments.worlds})


def searches(worlds: int, seed: int) -> dict[str, float]:
    """Search some worlds by the three ways."""
    gains: dict[str, list[float]] = {"search": [], "once": [], "random": []}
    possible, covered, believed, widened = [], [], [], []
    for number in range(worlds):
        rng = np.random.default_rng([seed, number])
        world = draw(rng)
        even = np.full(len(world.names), 1 / len(world.names))
        bounds = Bounds(np.full(len(even), float(FLOOR)), np.full(len(even), float(CEILING)))
        start, best = _loss(world, even), _loss(world, optimum(world, even[None])[0])
        possible.append(start - best)
        tried, losses = np.empty((0, len(even))), np.empty(0)
        for count in ROUNDS:
            more = propose(even, tried, losses, bounds, count, rng)
            tried, losses = (
                np.concatenate([tried, more]),
                np.concatenate([losses, _measured(world, more, rng)]),
            )
        found = best_mixture(even, tried, losses, bounds, rng)
        gain = start - _loss(world, found.mixture)
        gains["search"].append(gain)
        covered.append(found.gain_low <= gain <= found.gain_high)
        low, high = (
            found.gain + (end - found.gain) / found.widened for end in (found.gain_low, found.gain_high)
        )
        believed.append(low <= gain <= high)
        widened.append(found.widened)
        drawn = propose(even, tried[:0], losses[:0], bounds, sum(ROUNDS), rng)
        values = _measured(world, drawn, rng)
        gains["once"].append(start - _loss(world, best_mixture(even, drawn, values, bounds, rng).mixture))
        gains["random"].append(start - _loss(world, drawn[int(np.argmin(values))]))
    figures = {f"{way}_gain_fraction": float(np.sum(of) / np.sum(possible)) for way, of in gains.items()}
    figures |= {f"{way}_worst": float(np.min(np.array(of) / possible)) for way, of in gains.items()}
    return figures | {
        "search_beats_random_fraction": float(np.mean(np.array(gains["search"]) > gains["random"])),
        "gain_coverage": float(np.mean(covered)),
        "unwidened_coverage": float(np.mean(believed)),
        "widened_median": float(np.median(widened)),
        "nats_to_gain_mean": float(np.mean(possible)),
        "runs": float(sum(ROUNDS)),
    }


def _loss(world: World, mixture: np.ndarray) -> float:
    return float(world.goal(mixture[None]))


def _measured(world: World, mixtures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.array([_loss(world, one) for one in mixtures]) + NOISE * rng.normal(size=len(mixtures))


if __name__ == "__main__":
    main()
