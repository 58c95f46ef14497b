"""What something costs a step: steps with and without it in turn, in one process, on one model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MICRO, LENGTH = 2, 256


def stepper_of(folder: Path, device: str, seed: int, micro_batches: int) -> tuple[Any, Any, Any, Any]:
    """A stepper with its optimizer, the platform, the tokens of a step, and the configuration."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose(device)
    config = validate(
        {
            "run": {"directory": str(folder / "run"), "seed": seed},
            "model": {"preset": "tiny"},
            "parallel": {"device": device},
            "data": {"sequence_length": LENGTH, "sources": {"text": {"path": str(folder / "text")}}},
            "curriculum": [
                {
                    "name": "all",
                    "tokens": "1M",
                    "mixture": {"text": 1},
                    "global_batch_size": MICRO * micro_batches,
                    "learning_rate": {"peak": 1e-3},
                }
            ],
            "train": {"micro_batch_size": MICRO, "precision": platform.precision("auto")},
        },
        where="benchmarks",
    )
    distributed.start(platform, seed=seed)
    import torch

    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.train.step import Stepper, wrap_model

    wrapped = wrap_model(build_model(config, platform), config)
    optimizer = build_optimizer(config, wrapped)
    set_hyperparameters(optimizer, learning_rate=1e-4, weight_decay=0.1)
    stepper = Stepper(wrapped, optimizer, config, platform)
    tokens = torch.randint(0, 4096, (MICRO * micro_batches, LENGTH + 1), device=platform.device)
    return stepper, platform, tokens, config


def measure(
    without: Callable[[], None], with_it: Callable[[], None], seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with it, pair by pair; which comes first changes from pair to pair."""
    for step in (without, with_it, without, with_it):
        step()
    found: dict[Callable[[], None], list[float]] = {without: [], with_it: []}
    end, pair = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for step in (without, with_it) if pair % 2 else (with_it, without):
            begin = time.perf_counter()
            step()
            found[step].append(time.perf_counter() - begin)
        pair += 1
    return found[without], found[with_it]


def figures(without: list[float], with_it: list[float], seed: int) -> dict[str, float]:
    """The overhead and its noise: the median of the pairs' ratios, with a 95% interval by bootstrap over pairs."""
    ratios = np.array(with_it) / np.array(without) - 1
    generator = np.random.default_rng(seed)
    drawn = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    # The same without a difference: pairs of steps without it, which differ by the machine's mood alone.
    null = np.array(without[1::2]) / np.array(without[: len(without) // 2 * 2 : 2]) - 1
    return {
        "overhead_fraction": float(np.median(ratios)),
        "overhead_low": float(low),
        "overhead_high": float(high),
        "noise_of_one_pair": float(np.subtract(*np.quantile(null, (0.75, 0.25)))),
        "pairs": len(ratios),
        "seconds_a_step": statistics.median(without),
    }
