"""AdamW with moments in 8 bits against moments in fp32: the tiny model, several seeds, and what the state takes.

Each seed has its own weights and data; held-out batches are the same for all. Figures: `loss_fp32` and `loss_fp8`,
held out, means over seeds; `seed_noise`, the standard deviation of the first over seeds; `difference`, of the means,
and `difference_over_noise`; `largest_difference`, of any seed; `state_bytes_fp32` and `state_bytes_fp8`, of both
moments a parameter, counted over the tensors that the optimizer holds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common, ops_on_off
from megatron_davinci.kernels.ways import way_for

SEEDS, STEPS, HELD_OUT = 3, 200, 8
KINDS = ("fp32", "fp8")


def settings(kind: str, device: str, seed: int) -> dict[str, Any]:
    """Of a run in bf16 with fp32 main weights, as large ones are."""
    made = ops_on_off.settings({"optimizer": "davinci"}, device, seed)
    return {**made, "optimizer": {"moments": kind}, "train": {**made["train"], "precision": "bf16"}}


def train(kind: str, platform: Any, seed: int, steps: int) -> tuple[float, list[float], float]:
    """The held-out loss, that of each step, and bytes of moments a parameter."""
    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.train.step import Stepper, wrap_model

    config = validate(settings(kind, platform.name, seed), "benchmarks/optimizer_moments.py")
    distributed.seed_ranks(seed)
    wrapped = wrap_model(build_model(config, platform), config)
    optimizer = build_optimizer(config, wrapped)
    stepper, found = Stepper(wrapped, optimizer, config, platform), []
    for step in range(steps):
        rate = 2e-3 * min(1.0, (step + 1) / 20, 0.1 + 0.9 * (steps - step) / steps)
        set_hyperparameters(optimizer, learning_rate=rate, weight_decay=config.optimizer.weight_decay)
        found.append(stepper.train(ops_on_off.tokens_of(seed, step), 2).loss)
    held = torch.cat([ops_on_off.tokens_of(10**6, number) for number in range(HELD_OUT)])
    total, weight = stepper.loss(held, HELD_OUT, ops_on_off.BATCH)
    return total / weight, found, state_bytes(optimizer)


def state_bytes(optimizer: Any) -> float:
    """Of both moments and their ranges, a parameter."""
    inner = [one.optimizer for one in optimizer.chained_optimizers]
    states = [one.state[p] for one in inner for group in one.param_groups for p in group["params"]]
    parameters = sum(p.numel() for one in inner for group in one.param_groups for p in group["params"])
    return sum(tensor.nbytes for state in states for tensor in state.values()) / parameters


def compare(device: str, seed: int, seeds: int, steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures, and all losses."""
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose(device)  # type: ignore[arg-type]
    distributed.start(platform)
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    curves, figures = {}, {}
    for number in range(seeds):
        for kind in KINDS:
            loss, curve, nbytes = train(kind, platform, seed + number, steps)
            losses[kind].append(loss)
            curves[f"{kind}, seed {seed + number}"] = curve
            figures[f"state_bytes_{kind}"] = nbytes
    distributed.stop()
    means = {kind: statistics.mean(losses[kind]) for kind in KINDS}
    noise = statistics.stdev(losses["fp32"])
    apart = [eight - full for eight, full in zip(losses["fp8"], losses["fp32"], strict=True)]
    difference = statistics.mean(apart)
    figures |= {
        **{f"loss_{kind}": mean for kind, mean in means.items()},
        "seed_noise": noise,
        "difference": difference,
        "difference_over_noise": abs(difference) / noise,
        "largest_difference": max(map(abs, apart)),
        "steps": steps,
    }
    return figures, {"held_out": losses, "losses": curves}


def main() -> None:
    """Run the benchmark."""
    made = common.parser(__doc__ or "")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--steps", type=int, default=STEPS)
    arguments = made.parse_args()
    figures, peer = compare(arguments.device, arguments.seed, arguments.seeds, arguments.steps)
    on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    common.write(
        arguments.json, figures, {"way": str(way_for(torch.device("cuda" if on_gpu else "cpu"))), **peer}
    )


if __name__ == "__main__":
    main()
