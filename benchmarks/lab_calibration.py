"""Whether the lab's verdicts are right as often as they say, and whether its control check finds what it must.

Comparisons are simulated with the noise of real runs: the differences between seeds on record in
`benchmarks/results/*curriculum_study.json`, centred within each comparison and scaled for what the centring took, are
drawn again, with a little Gaussian noise so that values are not repeated. Half of the comparisons draw from a normal
distribution of the same deviation instead. Each has as many seeds as `pairs_needed` says for the effect that it is
made for, and goes through the same functions as a design's outcomes: a paired difference, its p-values, the word.

A third have no effect, a third the effect that they are made for (above the margin), a third one of exactly the
margin, where nothing may be called equivalent more often than alpha. A verdict is false when it says better or worse
of no effect, the wrong way round of an effect, or equivalent of one that reaches the margin.

Then designs are drawn: clean ones, and the same with one confound (seed, learning rate, weight decay, a source's
mixture, a batch size, tokens, held-out data, evaluation, precision, model size) put into an arm unasked.

figures: false_verdict_fraction, power, coverage, comparisons, equivalence_power, seeds_median,
    confounds_caught_fraction, clean_designs_accepted_fraction, confound_cases
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import common

from megatron_davinci.lab.design import Metric
from megatron_davinci.lab.verdict import Comparison, _decide
from megatron_davinci.stats.comparison import paired, pairs_needed

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.05


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--comparisons", type=int, default=3000)
    parser.add_argument("--designs", type=int, default=50)
    arguments = parser.parse_args()
    figures = verdicts(arguments.comparisons, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        figures |= confounds(Path(folder), arguments.designs, arguments.seed)
    common.write(arguments.json, figures, {})


def residuals() -> np.ndarray:
    """What seeds differ by from their comparison's mean, in units of its noise: [n], of mean 0 and deviation 1."""
    found: list[float] = []
    for path in sorted(RESULTS.glob("*curriculum_study.json")):
        said = json.loads(path.read_text())
        for one in (*said.get("controller_less", {}).values(), *said.get("against_best_fixed", {}).values()):
            values = np.array(list(one["by_seed"].values()))
            if len(values) > 2 and values.std(ddof=1) > 0:
                centred = values - values.mean()
                found += (centred / np.sqrt((centred**2).sum() / (len(values) - 1))).tolist()
    noise = np.array(found)
    if len(noise) < 6:
        raise RuntimeError(f"too few measured differences in {RESULTS}")
    return (noise - noise.mean()) / noise.std()


def verdicts(count: int, seed: int) -> dict[str, float]:
    """Simulate comparisons.

    Args:
        count: How many.
        seed: Of all draws.
    """
    generator, measured = np.random.default_rng(seed), residuals()
    false = covered = found = of_effect = same = of_none = 0
    seeds_used = []
    for number in range(count):
        deviation = float(np.exp(generator.uniform(np.log(0.003), np.log(0.03))))
        effect = deviation * float(generator.uniform(0.8, 4.0)) * float(generator.choice([-1, 1]))
        margin = abs(effect) * float(generator.uniform(0.3, 0.8))
        seeds = pairs_needed(abs(effect), deviation, alpha=ALPHA) or 2
        true = (0.0, effect, margin * float(np.sign(effect)))[number % 3]
        noise = generator.normal(size=seeds)
        if number % 2:
            noise = generator.choice(measured, size=seeds) + 0.3 * noise
            noise /= np.sqrt(1 + 0.3**2)
        values = dict(enumerate((true + deviation * noise).tolist()))
        control = dict.fromkeys(values, 0.0)
        difference = paired(values, control)
        draft = Comparison(
            "arm", "control", "", Metric(name="heldout_loss.mean", margin=margin), values, control, difference,
            "not enough evidence",
        )  # fmt: skip
        [one] = _decide([draft], ALPHA)
        seeds_used.append(seeds)
        covered += difference.low <= true <= difference.high
        wanted = "better" if true < 0 else "worse"
        if number % 3 == 0:
            false += one.word in ("better", "worse")
            of_none += 1
            same += one.word == "equivalent"
        else:
            false += one.word == "equivalent" or (one.word in ("better", "worse") and one.word != wanted)
        if number % 3 == 1:
            of_effect += 1
            found += one.word == wanted
    return {
        "comparisons": count,
        "false_verdict_fraction": false / count,
        "power": found / of_effect,
        "coverage": covered / count,
        "equivalence_power": same / of_none,
        "seeds_median": float(np.median(seeds_used)),
        "measured_differences": len(measured),
    }


# ---- the control check ----------------------------------------------------------------------------------------

CONFOUNDS: dict[str, dict[str, Any]] = {
    "seed": {"run.seed": 2},
    "learning rate": {"curriculum.0.learning_rate.peak": 2.5e-3},
    "warm-up": {"curriculum.0.learning_rate.warmup_steps": 11},
    "weight decay": {"optimizer.weight_decay": 0.05},
    "mixture": {"curriculum.0.mixture": {"a": 0.4, "b": 0.6}},
    "source": {"data.sources.b.path": "elsewhere/b"},
    "batch size": {"curriculum.0.global_batch_size": 16},
    "tokens": {"curriculum.0.tokens": 81920},
    "held-out data": {"data.validation.a": "elsewhere/a"},
    "evaluation": {"evaluation.sequences": 32},
    "precision": {"train.precision": "bf16"},
    "model": {"model.ffn_hidden_size": 96},
    "dropout": {"model.dropout": 0.1},
}
FACTORS: list[tuple[list[str], dict[str, Any]]] = [
    (["curriculum.0.learning_rate.shape", "curriculum.0.learning_rate.end"],
     {"curriculum.0.learning_rate.shape": "cosine", "curriculum.0.learning_rate.end": 1e-4}),
    (["optimizer.beta2"], {"optimizer.beta2": 0.99}),
    (["model.qk_norm"], {"model.qk_norm": True}),
    (["optimizer.clip_grad_norm"], {"optimizer.clip_grad_norm": 0.5}),
    (["model.tie_embeddings"], {"model.tie_embeddings": False}),
]  # fmt: skip


def base() -> dict[str, Any]:
    """A run's settings; no source is there, so that only the settings are looked at."""
    return {
        "run": {"directory": "runs/none", "seed": 1},
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
            "ffn_hidden_size": 64, "vocab_size": 256, "max_sequence_length": 32,
        },
        "parallel": {"device": "cpu"},
        "data": {
            "sequence_length": 32,
            "sources": {name: {"path": f"nowhere/{name}", "tokens": "1M"} for name in "ab"},
            "validation": {"a": "nowhere/a-valid"},
        },
        "curriculum": [
            {
                "name": "all", "tokens": 40960, "mixture": {"a": 0.5, "b": 0.5}, "global_batch_size": 8,
                "learning_rate": {"peak": 3e-3, "warmup_steps": 10},
            }
        ],
        "train": {"micro_batch_size": 2, "precision": "fp32"},
    }  # fmt: skip


def confounds(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Draw designs with a confound in one arm's own configuration file, and clean twins of them.

    Args:
        folder: An empty folder.
        count: How many of each.
        seed: Of the draws.
    """
    from megatron_davinci.lab.arms import arms_of
    from megatron_davinci.lab.control import check
    from megatron_davinci.lab.design import load_design

    chance = random.Random(seed)
    caught = accepted = 0
    for number in range(count):
        varies, setting = chance.choice(FACTORS)
        name, confound = chance.choice(list(CONFOUNDS.items()))
        for kind, extra in (("clean", {}), ("confounded", confound)):
            here = folder / f"{number}-{kind}"
            here.mkdir()
            (here / "base.yaml").write_text(yaml.safe_dump(base()))
            arm = base()
            for key, value in {**setting, **extra}.items():
                put(arm, key, value)
            (here / "arm.yaml").write_text(yaml.safe_dump(arm))
            design = {
                "question": "Does it help?",
                "base": "base.yaml",
                "varies": varies,
                "arms": {"control": {}, "changed": {"config": "arm.yaml"}},
                "seeds": [1, 2, 3],
                "metrics": [{"name": "heldout_loss.mean", "margin": 0.01}],
            }
            (here / "design.yaml").write_text(yaml.safe_dump(design))
            loaded = load_design(here / "design.yaml")
            found = check(loaded, arms_of(loaded))
            if kind == "clean":
                accepted += not found
                if found:
                    print(f"clean and refused: {varies}: {found}", file=sys.stderr)
            else:
                # By name: that something else is found would be no credit.
                keys = [key for key in confound if any(key in one.what for one in found)]
                caught += bool(keys) or (name == "tokens" and any(one.kind == "tokens" for one in found))
                if not found:
                    print(f"not caught: {name}", file=sys.stderr)
    return {
        "confound_cases": count,
        "confounds_caught_fraction": caught / count,
        "clean_designs_accepted_fraction": accepted / count,
    }


def put(settings: Any, key: str, value: Any) -> None:
    """Set a value by dotted key."""
    *path, last = key.split(".")
    for part in path:
        settings = settings[int(part)] if isinstance(settings, list) else settings.setdefault(part, {})
    settings[last] = value


if __name__ == "__main__":
    main()
