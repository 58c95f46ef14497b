"""Whether fitted scaling laws and crossover warnings are as sure as they say, where the truth is known.

Laws are drawn: floor 1 to 2.5 nats, exponents 0.2 to 0.5, a fall of 0.5 to 2 nats from the smallest size to the
floor; ladders of 5 or 6 sizes over a factor 30 to 100 (of L(N, D): 5 sizes by 4 budgets over a factor 30), 3 seeds,
relative noise of 0.1% to 0.4%. Each is fitted, and a prediction for ten times the largest size made.

Effects are drawn: half do not change with size; the others change, and cross zero at a size drawn within a factor 30
of the ladder on both sides. Noise of a pair as much as 0.3 to 1 of the change over the ladder; 3 to 5 seeds.

figures: <law>_exponent_coverage, <law>_floor_coverage, <law>_prediction_coverage (of 95% intervals),
    <law>_prediction_error_median (nats), <law>_prediction_width_median (nats), refused_fraction,
    slope_coverage, crossing_coverage (of effects whose slope is sure, so that chance has helped them: a little
    below 95%), false_trend_fraction (of effects that do not change), trend_power
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import common

from megatron_davinci.errors import DataError
from megatron_davinci.stats.crossover import trend
from megatron_davinci.stats.scaling import fit_scaling_law


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--laws", type=int, default=300)
    parser.add_argument("--effects", type=int, default=4000)
    arguments = parser.parse_args()
    figures = laws(arguments.laws, arguments.seed, of_data=False)
    figures |= laws(arguments.laws, arguments.seed, of_data=True)
    figures |= effects(arguments.effects, arguments.seed)
    common.write(arguments.json, figures, {"laws": arguments.laws, "effects": arguments.effects})


def laws(count: int, seed: int, *, of_data: bool) -> dict[str, float]:
    """Draw laws, fit them, and count what their intervals hold.

    Args:
        count: How many.
        seed: Of all draws.
        of_data: L(N, D) instead of L(N).
    """
    rng = np.random.default_rng([seed, int(of_data)])
    held: dict[str, list[bool]] = {"exponent": [], "floor": [], "prediction": []}
    errors, widths, refused = [], [], 0
    for _ in range(count):
        floor, a, b = rng.uniform(1, 2.5), rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5)
        fall, fall_d, noise = (
            rng.uniform(0.5, 2),
            rng.uniform(0.5, 2),
            np.exp(rng.uniform(np.log(1e-3), np.log(4e-3))),
        )
        if of_data:
            n, d = (one.ravel() for one in np.meshgrid(np.geomspace(1e6, 3e7, 5), np.geomspace(2e7, 6e8, 4)))
        else:
            n = np.geomspace(1e6, 1e6 * rng.uniform(30, 100), int(rng.integers(5, 7)))
            d = np.full(len(n), 2e7)
            fall_d = 0.0
        n, d = np.repeat(n, 1 if of_data else 3), np.repeat(d, 1 if of_data else 3)

        def truth(
            size: np.ndarray, tokens: np.ndarray, of: tuple[float, ...] = (floor, fall, a, fall_d, b)
        ) -> np.ndarray:
            return of[0] + of[1] * (size / 1e6) ** -of[2] + of[3] * (tokens / 2e7) ** -of[4]

        y = truth(n, d) * (1 + noise * rng.normal(size=len(n)))
        try:
            fitted = fit_scaling_law(n, y, d if of_data else None)
        except DataError:
            refused += 1
            continue
        exponent, e = fitted.interval("exponent"), fitted.interval("floor")
        big, many = 10 * n.max(), 10 * d.max() if of_data else d.max()
        ahead, true = fitted.predict(big, many if of_data else None), float(truth(big, many))
        held["exponent"].append(exponent.low <= a <= exponent.high)
        held["floor"].append(e.low <= floor <= e.high)
        held["prediction"].append(ahead.low <= true <= ahead.high)
        errors.append(abs(ahead.value - true))
        widths.append(ahead.high - ahead.low)
    prefix = "size_and_data" if of_data else "size"
    found = {f"{prefix}_{name}_coverage": float(np.mean(values)) for name, values in held.items()}
    return found | {
        f"{prefix}_prediction_error_median": float(np.median(errors)),
        f"{prefix}_prediction_width_median": float(np.median(widths)),
        f"{prefix}_refused_fraction": refused / count,
    }


def effects(count: int, seed: int) -> dict[str, float]:
    """Draw effects over sizes, and count what trends say of them."""
    rng = np.random.default_rng([seed, 2])
    slopes, crossings, false, found = [], [], [], []
    for number in range(count):
        sizes = np.geomspace(1e6, 1e8, int(rng.integers(2, 6)))
        change = rng.uniform(0.01, 0.05) * rng.choice([-1, 1])  # over the ladder
        slope = change / 2 if number % 2 else 0.0
        zero = rng.uniform(6 - 1.5, 8 + 1.5)
        noise, seeds = abs(change) * rng.uniform(0.3, 1), int(rng.integers(3, 6))
        level = rng.uniform(-0.05, 0.05)
        true = slope * (np.log10(sizes) - zero) if slope else np.full(len(sizes), level)
        line = trend(
            {size: mean + noise * rng.normal(size=seeds) for size, mean in zip(sizes, true, strict=True)}
        )
        assert line is not None
        slopes.append(line.low <= slope <= line.high)
        (found if slope else false).append(line.sure)
        if slope and line.crossing is not None:
            crossings.append(line.crossing_low <= 10**zero <= line.crossing_high)
    return {
        "slope_coverage": float(np.mean(slopes)),
        "crossing_coverage": float(np.mean(crossings)),
        "false_trend_fraction": float(np.mean(false)),
        "trend_power": float(np.mean(found)),
    }


if __name__ == "__main__":
    main()
