"""What the mean of a run's last checkpoints is worth, beside the last one and beside a decay of the learning rate.

    python examples/ablations/prepare.py
    python benchmarks/averaging.py --json FILE

For each seed, the model of `examples/ablations/laptop.yaml` reads the same samples in the same order twice: at
a constant learning rate, with a checkpoint after each 5% of it, and at the same rate to 80% and then down to
nothing. The mean is of the constant run's checkpoints from 80% on (`davinci convert average --last 5`), which
are as many tokens as the decay takes. Measured is the held-out loss, nats a token, mean of four domains, always
on the same windows: of what a run ends with, and of the mean, by a run that begins with it and takes one step
at a rate of 1e-12.

A soup is the mean of three runs that begin with the checkpoint at 80%, each with a fresh optimizer, and read other
samples while their rate falls to nothing; `soup_less_one` holds it against the mean of the three losses, and
`soup_less_best` against the lowest of them.

All differences are means over seeds of what is found within a seed, with their 95% intervals (Student's t).
`seeds_below_last` is the fraction of seeds where the mean is below the last checkpoint, `seeds_below_best` that where
the soup is below the best of its three. Claims to hold it against: Sanyal et al. 2023 (arXiv 2306.03241), Li et al.
2025 (arXiv 2505.12082), OLMo 2 (arXiv 2501.00656).
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import yaml

BASE = Path(__file__).resolve().parents[1] / "examples" / "ablations" / "laptop.yaml"
STEP = 8 * 128  # tokens
PARTS, LAST = 20, 5
MIXTURE = {"general": 0.4, "code": 0.2, "science": 0.25, "qa": 0.15}


def main() -> int:
    """Measure."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--steps", type=int, default=500, help="of a run; 20 divides it")
    parser.add_argument("--rate", type=float, default=3e-3, help="the learning rate")
    given = parser.parse_args()
    if given.seeds < 2 or given.steps < PARTS or given.steps % PARTS:
        parser.error(f"--seeds of 2 or more, and --steps that {PARTS} divides")
    seeds = random.Random(given.seed).sample(range(1, 1_000_000), given.seeds)
    losses: dict[str, list[float]] = {name: [] for name in ("last", "mean", "decayed", "soup", "best", "one")}
    with tempfile.TemporaryDirectory(prefix="davinci-averaging-") as root:
        for seed in seeds:
            for name, loss in one(Path(root) / str(seed), seed, given.steps, given.rate).items():
                losses[name].append(loss)
            print(seed, *(f"{name} {of[-1]:.4f}" for name, of in losses.items()), flush=True)
    figures: dict[str, float] = {f"{name}_loss": sum(of) / len(of) for name, of in losses.items()}
    for ours, other in (("mean", "last"), ("mean", "decayed"), ("soup", "one"), ("soup", "best")):
        pairs = zip(losses[ours], losses[other], strict=True)
        figures |= interval(f"{ours}_less_{other}", [mine - theirs for mine, theirs in pairs])
    for ours, other in (("mean", "last"), ("soup", "best")):
        below = [mine < theirs for mine, theirs in zip(losses[ours], losses[other], strict=True)]
        figures[f"seeds_below_{other}"] = sum(below) / len(below)
    figures |= {"seeds": len(seeds), "steps": given.steps, "rate": given.rate}
    common.write(given.json, figures, {"name": "the same run with a decay", "each": losses})
    return 0


def one(root: Path, seed: int, steps: int, rate: float) -> dict[str, float]:
    """Held-out losses of one seed: of the last checkpoint, of the mean, of the decayed run, and of the soup."""
    constant = {"shape": "constant", "peak": rate, "warmup_steps": steps // 10}
    decay = {"shape": "linear", "peak": rate, "end": 0.0}
    every = {"every_steps": steps // PARTS, "keep": PARTS}
    stages = [stage("constant", steps, constant)]
    found = {"last": train(root / "constant", seed, stages, every)}
    command("convert", "average", root / "constant", root / "mean", "--last", LAST)
    until = steps * (PARTS - LAST + 1) // PARTS
    stages = [stage("constant", until, constant), stage("decay", steps - until, decay)]
    found["decayed"] = train(root / "decayed", seed, stages, {})
    found["mean"] = measured(root / "mean", seed)

    begin = {"initial_weights": str(root / "constant" / "checkpoints" / f"step-{until:08d}")}
    stages = [stage("decay", steps - until, {**decay, "warmup_steps": (steps - until) // 10})]
    ends = [train(root / f"soup-{n}", seed + n, stages, begin) for n in (1, 2, 3)]
    command("convert", "average", *(root / f"soup-{n}" for n in (1, 2, 3)), root / "soup")
    return found | {"soup": measured(root / "soup", seed), "best": min(ends), "one": sum(ends) / len(ends)}


def measured(weights: Path, seed: int) -> float:
    """The held-out loss of weights, by a run that begins with them and moves them by nothing that matters."""
    still = [stage("still", 1, {"shape": "constant", "peak": 1e-12})]
    return train(
        weights.with_name(f"{weights.name}-measured"), seed, still, {"initial_weights": str(weights)}
    )


def stage(name: str, steps: int, rate: dict[str, Any]) -> dict[str, Any]:
    """A stage of so many steps."""
    return {
        "name": name,
        "tokens": steps * STEP,
        "mixture": MIXTURE,
        "global_batch_size": STEP // 128,
        "learning_rate": rate,
    }


def train(folder: Path, seed: int, stages: list[dict[str, Any]], checkpoint: dict[str, Any]) -> float:
    """Train, and give the held-out loss at the end: nats a token, mean of the domains."""
    settings = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    settings["run"] = {"directory": str(folder), "seed": seed}
    settings["curriculum"] = stages
    settings["checkpoint"] = {**settings["checkpoint"], **checkpoint}
    settings["evaluation"] = {**settings["evaluation"], "every_steps": None}
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command("train", path)
    last = json.loads((folder / "evals.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    losses = last["heldout_loss"]
    return float(sum(losses.values()) / len(losses))


def command(*words: object) -> None:
    """Run `davinci`; what it said is shown where it fails."""
    whole = [sys.executable, "-m", "megatron_davinci.cli.main", *map(str, words)]
    done = subprocess.run(whole, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def interval(name: str, values: list[float]) -> dict[str, float]:
    """The mean of values and its 95% interval."""
    from scipy import stats

    mean, count = sum(values) / len(values), len(values)
    error = math.sqrt(sum((one - mean) ** 2 for one in values) / (count - 1) / count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


if __name__ == "__main__":
    sys.exit(main())
