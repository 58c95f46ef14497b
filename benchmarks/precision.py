"""What each recipe of low precision costs in loss: a small model, several seeds, all recipes emulated.

A byte-level model learns Python's standard library, some modules of which are held out. For one seed all arms begin
with the same weights and see the same batches, so they are compared in pairs. The stand-in for full precision is
fp32, over which all recipes are emulated; bf16 is an arm like them. NVFP4 keeps its last layer; its other parts are
taken away one at a time.

Figures: `gap_ARM`, the mean over seeds of the held-out loss above fp32's, nats a token, and `se_gap_ARM`, its
standard error; `gap_fraction_ARM`, of fp32's loss; `heldout_fp32`, and `seed_deviation`, its deviation between seeds;
for NVFP4's parts `without_PART`, the mean difference to NVFP4 with all, and `se_without_PART`.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common

STEPS, SEEDS = 500, 3
BATCH, MICRO, LENGTH = 4, 4, 64
HELD_OUT_SEQUENCES = 128
EVERY = 8  # one module of so many is held out

NVFP4: dict[str, Any] = {"recipe": "nvfp4", "keep_last_layers": 1}
PARTS: dict[str, dict[str, Any]] = {
    "hadamard": {"nvfp4": {"hadamard": False}},
    "tiles": {"nvfp4": {"tiles": False}},
    "stochastic_rounding": {"nvfp4": {"stochastic_rounding": False}},
    "kept_layers": {"keep_last_layers": 0},
}
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "delayed": {"recipe": "delayed", "amax_history": 16},
    "current": {"recipe": "current"},
    "block": {"recipe": "block"},
    "mxfp8": {"recipe": "mxfp8"},
    "nvfp4": NVFP4,
    **{f"nvfp4_without_{part}": {**NVFP4, **change} for part, change in PARTS.items()},
}


def settings(arm: str, seed: int) -> dict[str, Any]:
    """Of a run in one arm."""
    low = {**ARMS[arm], "backend": "emulate", "watch_every_steps": None} if ARMS[arm] else {}
    return {
        "run": {"directory": "run", "seed": seed},
        "model": {
            "num_layers": 3,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 128,
            "vocab_size": 256,
            "max_sequence_length": LENGTH,
        },
        "parallel": {"device": "cpu"},
        "data": {"sequence_length": LENGTH, "sources": {"text": {"path": "text"}}},
        "curriculum": [
            {
                "name": "all",
                "tokens": "1B",
                "mixture": {"text": 1},
                "global_batch_size": BATCH,
                "learning_rate": {"peak": 1e-3},
            }
        ],
        "train": {
            "precision": "bf16" if arm == "bf16" else "fp32",
            "micro_batch_size": MICRO,
            "threads": 1,
            "low_precision": low,
        },
    }


def text() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Bytes of the standard library's modules to train on and held out, and a digest of both."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kept = [
        b"".join(m.read_bytes() for n, m in enumerate(modules) if (n % EVERY == 0) == out)
        for out in (False, True)
    ]
    digest = hashlib.sha256(b"".join(kept)).hexdigest()
    train, held_out = (torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in kept)
    return train, held_out, digest


def windows(source: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """[count, LENGTH + 1] from random places."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(source) - LENGTH, (count, 1), generator=generator)
    return source[places + torch.arange(LENGTH + 1)].long()


def rate(step: int, steps: int, peak: float) -> float:
    """A warm-up over a twentieth, then a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm)))


def run(
    arm: str, seed: int, steps: int, peak: float, source: torch.Tensor, held_out: torch.Tensor
) -> dict[str, Any]:
    """Train one arm: its held-out loss at the end, and its training losses."""
    import numpy as np

    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.step import Stepper, wrap_model

    config = validate(settings(arm, seed), "benchmarks/precision.py")
    distributed.seed_ranks(seed)
    wrapped = wrap_model(build_model(config, choose("cpu", threads=1)), config)
    optimizer = build_optimizer(config, wrapped)
    stepper = Stepper(wrapped, optimizer, config, choose("cpu", threads=1))
    losses, began = [], time.process_time()
    for step in range(steps):
        set_hyperparameters(
            optimizer, learning_rate=rate(step, steps, peak), weight_decay=config.optimizer.weight_decay
        )
        batch = windows(source, BATCH, seed * 1_000_003 + step)
        numbers = np.arange(step * BATCH, (step + 1) * BATCH)
        losses.append(stepper.train(batch, BATCH // MICRO, numbers=numbers).loss)
    seconds = time.process_time() - began
    total, count = stepper.loss(windows(held_out, HELD_OUT_SEQUENCES, 0), HELD_OUT_SEQUENCES // 16, 16)
    return {
        "heldout": total / count,
        "losses": [round(loss, 5) for loss in losses],
        "seconds": round(seconds, 1),
    }


def figures_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """What the runs of all arms come to; runs of an arm are by seed."""
    heldout = {arm: [one["heldout"] for one in runs] for arm, runs in found.items()}
    figures = {"heldout_fp32": statistics.fmean(heldout["fp32"])}
    if len(heldout["fp32"]) > 1:
        figures["seed_deviation"] = statistics.stdev(heldout["fp32"])
    for arm in found:
        if arm != "fp32":
            _pair(figures, "gap_" + arm, heldout[arm], heldout["fp32"])
            figures[f"gap_fraction_{arm}"] = figures[f"gap_{arm}"] / figures["heldout_fp32"]
    for part in PARTS:
        if (arm := f"nvfp4_without_{part}") in found:
            _pair(figures, f"without_{part}", heldout[arm], heldout["nvfp4"])
    return figures


def _pair(figures: dict[str, float], name: str, ours: list[float], theirs: list[float]) -> None:
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    figures[name] = statistics.fmean(differences)
    if len(differences) > 1:
        figures[f"se_{name}"] = statistics.stdev(differences) / math.sqrt(len(differences))


def main() -> None:
    """Run the benchmark."""
    made = common.parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--seeds", type=int, default=SEEDS, help="runs an arm, from --seed on")
    made.add_argument("--learning-rate", type=float, default=2e-3)
    made.add_argument("--only", nargs="+", choices=tuple(ARMS), metavar="ARM", help="beside fp32 and nvfp4")
    arguments = made.parse_args()

    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    source, held_out, digest = text()
    distributed.start(choose("cpu", threads=1))
    arms = [arm for arm in ARMS if arguments.only is None or arm in ("fp32", "nvfp4", *arguments.only)]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for arm in arms:
            one = run(arm, seed, arguments.steps, arguments.learning_rate, source, held_out)
            found[arm].append(one)
            print(f"seed {seed} {arm:<34} held out {one['heldout']:.4f}  {one['seconds']:.0f} s", flush=True)
        # After each seed, so that what a long benchmark has found is not lost.
        peer = {
            "seeds": seed - arguments.seed + 1,
            "steps": arguments.steps,
            "learning_rate": arguments.learning_rate,
            "text": digest,
            "heldout": {arm: [one["heldout"] for one in runs] for arm, runs in found.items()},
            "cpu_seconds": {arm: [one["seconds"] for one in runs] for arm, runs in found.items()},
            "losses_first_seed": {
                arm: runs[0]["losses"][:: max(1, arguments.steps // 50)] for arm, runs in found.items()
            },
        }
        common.write(arguments.json, figures_of(found), peer)
    distributed.stop()


if __name__ == "__main__":
    main()
