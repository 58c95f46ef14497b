"""Whether the saturation monitor finds knees where they are, and only there, on trajectories drawn from --seed.

Rules of the simulated world. The monitor's priors and the world were set together: noise and what is left after a
knee were narrowed until the Cramér-Rao bound allows a knee to be placed within 10%, so a harsher world scores lower.

A knee is where a trajectory's growth against log-tokens ends: the two limbs, drawn on, meet there. Its position
counts as found when a knee is claimed and lies within 10% of the true token count. After it, -5% to 15% of the
growth a doubling is left. The bend has a width of 0 to 0.15 in natural log-tokens (80% of a bend of width w lies
within 4.4 w). Before it, growth is linear in log-tokens, a power law (exponent to 0.25), or accelerates (exponent
to -0.4).

Trajectories are loss (falls by 0.4 to 1.5 nats up to the knee) or scores of a suite (rise by 10 to 30 points), with
30 to 80 evaluations, equally far apart in tokens or closer together early, as a batch ramp makes them. Knees lie at
20% to 60% of the tokens. Noise: 0.2% to 1.2% of the growth (0.001 to 0.018 nats; 0.02 to 0.36 points; the report's
Table 9 moves by 0.16 points of General from one checkpoint to the next), AR(1) with a coefficient of 0 to 0.3, and
one in fifty evaluations is off by five times as much. More noise is measured apart (knee_found_at_noise_*): what no
estimator can place within 10% is not in the first figure.

Without a knee: a power law (exponent to 0.5), a straight line in log-tokens, growth that accelerates, noise alone,
and a power law with one or two steps of a learning rate (2% to 25% of the growth), with the same noise.

The report's shapes: general rises to a knee near 1T tokens, code and science rise on to 4T (daVinci-LLM, section
4.2), evaluated every 5,000 steps under its batch ramp, with end values of its figures and the noise that its Table
9 shows: 0.1 to 0.25 points for General, 0.4 to 0.8 for Code, 0.2 to 0.4 for Science.

figures: knee_found_fraction, knee_false_alarm_fraction (and by kind), interval_covers_fraction (95% interval of the
position), *_said_* (states), report_*, knee_found_at_noise_LEVEL, sequential_false_alarm_fraction (a knee claimed
at any evaluation from the 8th on, as a controller asks)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray

from megatron_davinci.stats.curves import bent, growth
from megatron_davinci.stats.saturation import LEAST_POINTS, saturation

CONDITIONS = {
    "evaluations": [30, 80],
    "knee_at_fraction_of_tokens": [0.2, 0.6],
    "noise_fraction_of_growth": [0.002, 0.012],
    "noise_ar1": [0.0, 0.3],
    "outliers": {"fraction": 0.02, "times_noise": 5},
    "bend_width_log_tokens": [0.0, 0.15],
    "growth_left_after_knee": [-0.05, 0.15],
    "false_alarm_worlds": ["power", "line", "accelerating", "noise", "one step", "two steps"],
    "found_within": 0.1,
}
NOISE_LEVELS = (0.005, 0.01, 0.02, 0.04)
WITHOUT = ("power", "line", "accelerating", "noise", "steps")


@dataclass(frozen=True)
class Trajectory:
    """One simulated trajectory."""

    tokens: NDArray
    values: NDArray
    better: str
    knee: float | None
    kind: str


def positions(rng: np.random.Generator) -> NDArray:
    """Where evaluations are, in tokens."""
    count, total = int(rng.integers(30, 81)), 10 ** rng.uniform(8, 13)
    even = np.arange(1, count + 1) / count
    if rng.random() < 0.5:
        return even * total
    # Batches of 1, 2 and 4: evaluations every so many steps are four times as close at first.
    steps = np.where(even < rng.uniform(0.1, 0.3), 0.25, np.where(even < 0.4, 0.5, 1.0))
    return np.cumsum(steps) / steps.sum() * total


def noise(rng: np.random.Generator, count: int, deviation: float) -> NDArray:
    """AR(1) noise with outliers."""
    rho = rng.uniform(0, 0.3)
    white = rng.normal(0, deviation * np.sqrt(1 - rho**2), count)
    found = np.empty(count)
    found[0] = rng.normal(0, deviation)
    for i in range(1, count):
        found[i] = rho * found[i - 1] + white[i]
    outliers = rng.random(count) < 0.02
    return found + outliers * rng.choice([-1, 1], count) * 5 * deviation


def finished(
    rng: np.random.Generator,
    tokens: NDArray,
    curve: NDArray,
    knee: float | None,
    kind: str,
    level: float | None = None,
) -> Trajectory:
    """Scale a curve that grows by 1, add noise, and make it a loss or a score."""
    is_loss = rng.random() < 0.5
    size = rng.uniform(0.4, 1.5) if is_loss else rng.uniform(10, 30)
    deviation = np.exp(rng.uniform(np.log(0.002), np.log(0.012)))
    deviation = deviation if level is None else level
    values = size * (curve + noise(rng, len(tokens), deviation))
    return Trajectory(
        tokens, 4 - values if is_loss else 25 + values, "lower" if is_loss else "higher", knee, kind
    )


def with_knee(rng: np.random.Generator, level: float | None = None) -> Trajectory:
    """A trajectory with a knee."""
    tokens = positions(rng)
    x = np.log(tokens)
    knee = np.log(rng.uniform(0.2, 0.6) * tokens[-1])
    exponent = rng.choice([0.0, rng.uniform(0, 0.25), rng.uniform(-0.4, 0)])
    before = growth(bent(x, knee, max(rng.uniform(0, 0.15), 1e-3)), exponent, x[0])
    after = rng.uniform(-0.05, 0.15) * (growth(x, exponent, x[0]) - before)
    return finished(
        rng, tokens, (before + after) / growth(knee, exponent, x[0]), float(np.exp(knee)), "knee", level
    )


def without_knee(rng: np.random.Generator, kind: str) -> Trajectory:
    """A trajectory that has none."""
    tokens = positions(rng)
    x = np.log(tokens)
    exponent = {"line": 0.0, "accelerating": rng.uniform(-0.4, 0)}.get(kind, rng.uniform(0.02, 0.5))
    curve = growth(x, exponent, x[0]) / growth(x[-1], exponent, x[0])
    if kind == "noise":
        curve = np.zeros_like(x)
    if kind == "steps":
        for _ in range(rng.integers(1, 3)):
            at = rng.uniform(0.15, 0.9) * tokens[-1]
            curve = curve + rng.choice([-1, 1], p=[0.2, 0.8]) * rng.uniform(0.02, 0.25) * (tokens > at)
    return finished(rng, tokens, curve, None, kind)


def report_shapes(rng: np.random.Generator) -> list[Trajectory]:
    """General, code and science of the report's stage 1-1."""
    step_tokens = np.concatenate([np.full(70_000, 1024.0), np.full(40_000, 2048.0), np.full(201_000, 4096.0)])
    tokens = np.cumsum(step_tokens)[4999::5000] * 4096
    x, found = np.log(tokens), []
    knee = np.log(rng.uniform(0.9e12, 1.1e12))
    shapes = {
        "general": (bent(x, knee, 0.08), 33.0, 49.8, float(np.exp(knee)), (0.1, 0.25)),
        "code": (x, 5.0, 33.0, None, (0.4, 0.8)),
        "science": (x, 14.0, 28.5, None, (0.2, 0.4)),
    }
    for name, (shape, first, last, at, level) in shapes.items():
        curve = first + (last - first) * (shape - shape[0]) / (shape[-1] - shape[0])
        values = curve + noise(rng, len(x), rng.uniform(*level))
        found.append(Trajectory(tokens, values, "higher", at, name))
    return found


def asked(t: Trajectory, end: int | None = None) -> Any:
    """What the monitor says of a trajectory, or of its beginning."""
    return saturation(t.tokens[:end], t.values[:end], better=t.better)  # type: ignore[arg-type]


def is_found(t: Trajectory, answer: Any) -> bool:
    """Whether the knee is claimed within 10% of its position."""
    return answer.knee is not None and abs(answer.knee.tokens / t.knee - 1) <= CONDITIONS["found_within"]


def main() -> None:
    """Simulate, ask, count."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--trajectories", type=int, default=300, help="with a knee, and as many without")
    parser.add_argument(
        "--sequential", type=int, default=5, help="trajectories without, asked at every evaluation"
    )
    arguments = parser.parse_args()
    rng, count = np.random.default_rng(arguments.seed), arguments.trajectories
    knees = [(t := with_knee(rng), asked(t)) for _ in range(count)]
    none = [(t := without_knee(rng, WITHOUT[i % len(WITHOUT)]), asked(t)) for i in range(count)]
    report = [(t, asked(t)) for _ in range(max(count // 10, 1)) for t in report_shapes(rng)]
    claimed = [answer.knee is not None for _, answer in none]
    covered = [a.knee.low <= t.knee <= a.knee.high for t, a in knees if a.knee is not None]
    figures = {
        "knee_found_fraction": float(np.mean([is_found(t, a) for t, a in knees])),
        "knee_false_alarm_fraction": float(np.mean(claimed)),
        "knee_claimed_fraction": float(np.mean([a.knee is not None for _, a in knees])),
        "interval_covers_fraction": float(np.mean(covered)),
        "saturated_said_with_knee_fraction": float(np.mean([a.state == "saturated" for _, a in knees])),
    }
    for kind in WITHOUT:
        said = [a for t, a in none if t.kind == kind]
        figures[f"false_alarm_{kind}"] = float(np.mean([a.knee is not None for a in said]))
    lines = [a.state == "growing" for t, a in none if t.kind == "line"]
    figures["growing_said_of_lines_fraction"] = float(np.mean(lines))
    figures["report_general_found_fraction"] = float(
        np.mean([is_found(t, a) for t, a in report if t.knee is not None])
    )
    figures["report_rising_false_alarm_fraction"] = float(
        np.mean([a.knee is not None for t, a in report if t.knee is None])
    )
    for level in NOISE_LEVELS:
        apart = [(t := with_knee(rng, level), asked(t)) for _ in range(max(count // 8, 1))]
        figures[f"knee_found_at_noise_{level:g}"] = float(np.mean([is_found(t, a) for t, a in apart]))
    ever = []
    for i in range(arguments.sequential):
        t = without_knee(rng, WITHOUT[i % len(WITHOUT)])
        ever.append(any(asked(t, end).knee is not None for end in range(LEAST_POINTS, len(t.tokens) + 1)))
    if ever:
        figures["sequential_false_alarm_fraction"] = float(np.mean(ever))
    print(f"conditions: {CONDITIONS}\n")
    common.write(
        arguments.json, figures, {"conditions": CONDITIONS, "trajectories": count, "seed": arguments.seed}
    )


if __name__ == "__main__":
    main()
