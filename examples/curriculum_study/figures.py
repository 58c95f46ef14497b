"""From run directories to figures: losses, differences paired by seed, what was drawn, and what follows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from study_runs import Run

from megatron_davinci.data import Curriculum
from megatron_davinci.data.apportion import exact_weight
from megatron_davinci.data.journal import Journal
from megatron_davinci.train.run_directory import read_lines


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        run: The run.
        tokens: `[n]` at each evaluation.
        losses: Held-out loss by domain, `[n]` each, nats a token.
        bits: Bits a byte by domain at the end; empty where they were not recorded.
        edges: `[m + 1]` tokens: mixture `i` holds from `edges[i]` to `edges[i + 1]`.
        shares: By domain, `[m]`.
        given: Tokens by domain.
        origins: `[m]` who decided each mixture.
        decisions: Of the controller: lines of `proposals.jsonl`.
    """

    run: Run
    tokens: NDArray
    losses: dict[str, NDArray]
    bits: dict[str, float]
    edges: NDArray
    shares: dict[str, NDArray]
    given: dict[str, int]
    origins: list[str]
    decisions: list[dict]

    @property
    def goal(self) -> float:
        """Mean over domains of the held-out loss at the end."""
        return float(np.mean([curve[-1] for curve in self.losses.values()]))

    @property
    def goals(self) -> NDArray:
        """[n] the same at each evaluation."""
        return np.mean(list(self.losses.values()), axis=0)

    @property
    def drawn(self) -> dict[str, float]:
        """Share of all tokens by domain."""
        total = sum(self.given.values())
        return {name: count / total for name, count in self.given.items()}


def outcome(run: Run) -> Outcome:
    """Read a run that is done."""
    evaluations = read_lines(run.directory.evaluations)
    config = run.config()
    length, total = config.data.sequence_length, evaluations[-1]["consumed_samples"]
    records = Journal.open(run.directory.journal, config.data.sources).mixes
    domains = list(config.data.validation)
    return Outcome(
        run=run,
        tokens=np.array([line["consumed_tokens"] for line in evaluations], float),
        losses={d: np.array([line["heldout_loss"][d] for line in evaluations]) for d in domains},
        bits=dict(evaluations[-1].get("heldout_bits_per_byte", {})),
        edges=np.array([*(record.first_sample for record in records), total], float) * length,
        shares={d: np.array([_share(record.weights, d) for record in records]) for d in domains},
        given={domain: samples * length for domain, samples in samples_drawn(run).items()},
        origins=[record.origin for record in records],
        decisions=read_lines(run.directory.proposals),
    )


def samples_drawn(run: Run) -> dict[str, int]:
    """What a run that is done drew of each domain, by its journal."""
    manifest = json.loads((run.directory.path / "manifest.json").read_text(encoding="utf-8"))
    mixes = Journal.open(run.directory.journal).mixes
    total = read_lines(run.directory.evaluations)[-1]["consumed_samples"]
    return Curriculum(manifest["windows"], run.seed, mixes).consumed(total)


def change_times(run: Run) -> list[int]:
    """Samples from which on the controller's mixtures held."""
    records = Journal.open(run.directory.journal).mixes
    return [record.first_sample for record in records if record.origin == "controller"]


def _share(weights: Mapping[str, str], domain: str) -> float:
    return float(exact_weight(weights[domain])) if domain in weights else 0.0


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95% interval.

    Attributes:
        mean: In nats a token; below 0 is better.
        low: Lower end; minus infinity with one seed.
        high: Upper end.
        each: By seed.
    """

    mean: float
    low: float
    high: float
    each: dict[int, float]

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no difference beyond noise`; `unknown` with one seed."""
        if len(self.each) < 2:
            return "unknown"
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "no difference beyond noise"

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        known = len(self.each) > 1
        return {
            "mean": round(self.mean, 6),
            "low": round(self.low, 6) if known else None,
            "high": round(self.high, 6) if known else None,
            "by_seed": {str(seed): round(value, 6) for seed, value in self.each.items()},
            "verdict": self.verdict,
        }


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Ours less theirs over the seeds that both have: the mean with Student's interval for paired values."""
    seeds = sorted(set(ours) & set(theirs))
    each = {seed: ours[seed] - theirs[seed] for seed in seeds}
    values = np.array(list(each.values()))
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(mean, -np.inf, np.inf, each)
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / sqrt(len(values))
    return Difference(mean, mean - half, mean + half, each)


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """A quantile of Student's t, above the median, by integrating its density and halving.

    Args:
        freedom: Degrees of freedom.
        probability: Above 0.5.
    """
    # x = tan(u) maps the half line to [0, pi/2), where the density is smooth: cos(u)^(freedom - 1), scaled.
    scaled = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(scaled) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    at = np.interp(2 * probability - 1, cumulative / cumulative[-1], scaled)
    return float(np.tan(at) * sqrt(freedom))


def by_arm(outcomes: Sequence[Outcome]) -> dict[str, dict[int, Outcome]]:
    """Outcomes by arm and seed."""
    found: dict[str, dict[int, Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.run.arm.name, {})[one.run.seed] = one
    return found


def goals(outcomes: Mapping[int, Outcome]) -> dict[int, float]:
    """The goal by seed."""
    return {seed: one.goal for seed, one in outcomes.items()}


def mean_goal(outcomes: Mapping[int, Outcome]) -> float:
    """The goal, as the mean over seeds."""
    return float(np.mean(list(goals(outcomes).values())))


def best(names: Sequence[str], arms: Mapping[str, Mapping[int, Outcome]]) -> str:
    """The arm of the least mean, among those with the most seeds: one seed alone proves little."""
    most = max(len(arms[name]) for name in names)
    return min((name for name in names if len(arms[name]) == most), key=lambda name: mean_goal(arms[name]))


def distance(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """How much of the tokens would have to be drawn from elsewhere to make one of the other: 0 to 1."""
    return sum(abs(first[name] - second[name]) for name in first) / 2
