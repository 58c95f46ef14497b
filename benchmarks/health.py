"""What the spike detector finds, and what it takes for a spike, on drawn runs: both in one go, from --seed.

Rules of the simulated world. A run has 2,000 steps in two stages. Its loss falls by a power law (from 9 to 11 nats to
2 to 4, exponent 0.1 to 0.5), and jumps by up to 0.5 nats, either way, where the second stage begins, at a quarter to
three quarters of the run. Noise of the loss, a mean over a batch: Student-t with 10 degrees of freedom, AR(1) with a
coefficient of 0 to 0.3, a deviation of 0.01 to 0.08 nats. The gradient's norm: log-normal around a level that
falls with the warm-up and drifts (an Ornstein-Uhlenbeck process of 0.2 in the logarithm over 300 steps), a deviation
of 0.08 to 0.3, AR(1) of 0.2 to 0.7; one step in 500 is 1.3 to 1.8 times as high by itself.

A planted spike begins at a step that the detector has enough steps before. Three kinds, one a run: a loss spike of 8
to 60 deviations of the loss's noise, and at least 4% of the loss, which decays over 5 to 30 steps and has a gradient
norm 2 to 10 times as high; one bad batch, of the same height and one step long; and a gradient norm 6 to 50 times as
high while the loss stays. It is detected when its first step is judged a spike: at the second the update is applied.

The detector is asked as `health.spikes.policy: skip` asks it: what is judged a spike does not enter the window.

peer: the rules of OLMo-core's SkipStepOptimizer (above the mean by 6 standard deviations of the last 128 steps, loss
or gradient norm) and of Megatron-LM's spike check (10 times the largest loss of the first 100), on the same runs.

figures: spike_detected_fraction (and by kind), clean_accepted_fraction (of steps without a spike),
false_alarm_fraction (of the same steps), clean_runs_without_alarm_fraction (of runs without a spike)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import common
import numpy as np
from numpy.typing import NDArray

from megatron_davinci.config.health import SpikesConfig
from megatron_davinci.stats.spikes import SpikeWindow

STEPS = 2000
KINDS = ("loss", "batch", "gradient")


@dataclass(frozen=True)
class Run:
    """One drawn run; `spike` is the step at which one begins, None for none."""

    loss: NDArray
    norm: NDArray
    second_stage: int
    spike: int | None
    kind: str
    affected: int


def correlated(rng: np.random.Generator, white: NDArray, rho: float) -> NDArray:
    """AR(1) noise of the same variance."""
    found = np.empty_like(white)
    found[0] = white[0]
    for i in range(1, len(white)):
        found[i] = rho * found[i - 1] + np.sqrt(1 - rho**2) * white[i]
    return found


def draw(rng: np.random.Generator, kind: str | None) -> Run:
    """Draw a run, with a spike of a kind or none."""
    at = np.arange(1, STEPS + 1)
    first, last, exponent = rng.uniform(9, 11), rng.uniform(2, 4), rng.uniform(0.1, 0.5)
    curve = last + (first - last) * (at ** (-exponent) - STEPS ** (-exponent)) / (1 - STEPS ** (-exponent))
    second = int(rng.uniform(0.25, 0.75) * STEPS)
    curve = curve + (at > second) * rng.uniform(-0.5, 0.5)
    deviation = np.exp(rng.uniform(np.log(0.01), np.log(0.08)))
    white = rng.standard_t(10, STEPS) / np.sqrt(10 / 8)
    loss = curve + deviation * correlated(rng, white, rng.uniform(0, 0.3))
    drift = correlated(rng, rng.normal(0, 1, STEPS), np.exp(-1 / 300)) * 0.2
    level = np.log(rng.uniform(0.2, 1.0)) + rng.uniform(0, 2) * np.exp(-at / rng.uniform(20, 100))
    norm = np.exp(
        level
        + drift
        + rng.uniform(0.08, 0.3) * correlated(rng, rng.normal(0, 1, STEPS), rng.uniform(0.2, 0.7))
    )
    norm = norm * np.where(rng.random(STEPS) < 1 / 500, rng.uniform(1.3, 1.8, STEPS), 1.0)
    spike, affected = None, 0
    if kind is not None:
        least = SpikesConfig().least
        begins = [(least, second), (second + least, STEPS - 40)]
        low, high = begins[int(rng.integers(2))]
        spike = int(rng.integers(low, high))
        length = {"loss": int(rng.integers(5, 31)), "batch": 1, "gradient": 1}[kind]
        affected = 3 * length if kind == "loss" else 1
        decay = np.exp(-np.arange(affected) / length) if kind == "loss" else np.ones(1)
        part = slice(spike, spike + affected)
        decay = decay[: len(loss[part])]
        if kind == "gradient":
            norm[part] *= rng.uniform(6, 50)
        else:
            height = max(np.exp(rng.uniform(np.log(8), np.log(60))) * deviation, 0.04 * loss[spike])
            loss[part] += height * decay
            norm[part] *= 1 + (rng.uniform(2, 10) - 1) * decay
    return Run(loss, norm, second, spike, kind or "none", affected)


Judge = Callable[[Run], NDArray]


def ours(run: Run) -> NDArray:
    """The steps that the detector judges to be spikes."""
    config = SpikesConfig()
    window = SpikeWindow(config.window, config.least, config.deviations)
    flagged = np.zeros(STEPS, bool)
    for i in range(STEPS):
        stage = i >= run.second_stage
        flagged[i] = window.judge(run.loss[i], run.norm[i], stage) is not None
        if not flagged[i]:
            window.add(run.loss[i], run.norm[i], stage)
    return flagged


def six_sigma(run: Run) -> NDArray:
    """OLMo-core's rule."""
    losses: deque[float] = deque(maxlen=128)
    norms: deque[float] = deque(maxlen=128)
    flagged = np.zeros(STEPS, bool)
    for i in range(STEPS):
        if len(losses) >= 64:
            flagged[i] = any(
                value > np.mean(seen) + 6 * np.std(seen, ddof=1)
                for value, seen in ((run.loss[i], losses), (run.norm[i], norms))
            )
        losses.append(run.loss[i])
        norms.append(run.norm[i])
    return flagged


def ten_times(run: Run) -> NDArray:
    """Megatron-LM's rule."""
    return run.loss > 10 * run.loss[:100].max()


def measured(runs: list[Run], judge: Judge) -> dict[str, float]:
    """The fractions."""
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    alarms = clean = 0
    without: list[bool] = []
    for run in runs:
        flagged = judge(run)
        is_clean = np.ones(STEPS, bool)
        if run.spike is not None:
            found[run.kind].append(bool(flagged[run.spike]))
            is_clean[run.spike : run.spike + run.affected] = False
        else:
            without.append(not flagged.any())
        alarms += int((flagged & is_clean).sum())
        clean += int(is_clean.sum())
    of_all = [one for kind in KINDS for one in found[kind]]
    figures = {"spike_detected_fraction": float(np.mean(of_all))}
    figures |= {f"spike_detected_fraction_{kind}": float(np.mean(found[kind])) for kind in KINDS}
    figures["clean_accepted_fraction"] = 1 - alarms / clean
    figures["false_alarm_fraction"] = alarms / clean
    figures["clean_runs_without_alarm_fraction"] = float(np.mean(without))
    return figures


def main() -> None:
    """Draw runs, judge their steps, print and write the fractions."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--runs", type=int, default=40, help="of each kind, and as many without a spike")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    runs = [draw(rng, kind) for _ in range(arguments.runs) for kind in (*KINDS, None)]
    config = SpikesConfig()
    peers = {
        "olmo_core_6_sigma": measured(runs, six_sigma),
        "megatron_10_times_max": measured(runs, ten_times),
    }
    for name, figures in peers.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:<40}{value:.6g}")
    common.write(
        arguments.json,
        {**measured(runs, ours), "steps": float(STEPS * len(runs))},
        {**peers, "settings": config.model_dump(), "runs_of_each_kind": arguments.runs},
    )


if __name__ == "__main__":
    main()
