"""Tokens per second of our training loop against a bare Megatron-Core loop of the same model.

Both take steps in turn, a block at a time, in one process and on the same model configuration, so that the machine's
mood hits both alike. The bare loop is the one of Megatron-Core's own quick start: its schedule, its optimizer,
tokens that are in memory already, and nothing read, written, logged or shown. Ours is `TrainingRun`, whole: data by
sample number with prefetch, schedules, per-step metrics on disk, TensorBoard, the global loss.

figures: ours_tokens_per_second, bare_tokens_per_second, ratio_to_bare_loop (median over blocks of ours / bare)
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

BATCH, MICRO, LENGTH = 8, 2, 256
BLOCKS, STEPS = 10, 6


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=("tiny", "150m"), default="tiny")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = measure(arguments, Path(folder))
    tokens = BATCH * LENGTH
    ratios = [b / a for a, b in zip(ours, bare, strict=True)]
    figures = {
        "ours_tokens_per_second": tokens / statistics.median(ours),
        "bare_tokens_per_second": tokens / statistics.median(bare),
        "ratio_to_bare_loop": statistics.median(ratios),
        "ratio_lowest_block": min(ratios),
        "ratio_highest_block": max(ratios),
    }
    common.write(arguments.json, figures, {"name": "bare Megatron-Core loop", "seconds_a_step": bare})


def measure(arguments: Any, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds a step of both loops, block by block."""
    from megatron_davinci.config import validate
    from megatron_davinci.data import IndexedDatasetWriter
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    generator = np.random.default_rng(arguments.seed)
    with IndexedDatasetWriter(folder / "text", np.uint16) as writer:
        writer.add_document(generator.integers(0, 4096, size=400_000))
    platform = choose(arguments.device)
    total = (BLOCKS + 1) * STEPS
    config = validate(
        {
            "run": {"directory": str(folder / "run"), "seed": arguments.seed},
            "model": {"preset": arguments.preset},
            "parallel": {"device": arguments.device},
            "data": {"sequence_length": LENGTH, "sources": {"text": {"path": str(folder / "text")}}},
            "curriculum": [
                {
                    "name": "all",
                    "tokens": total * BATCH * LENGTH,
                    "mixture": {"text": 1},
                    "global_batch_size": BATCH,
                    "learning_rate": {"peak": 1e-3},
                }
            ],
            "train": {"micro_batch_size": MICRO, "precision": platform.precision(arguments.precision)},
            "logging": {"progress": "none"},
        },
        where="benchmarks/loop_overhead.py",
    )
    distributed.start(platform, seed=arguments.seed)
    try:
        from megatron_davinci.train.loop import TrainingRun

        run, bare_step = TrainingRun(config, platform), make_bare_step(config, platform)
        ours, bare = [], []
        for block in range(BLOCKS + 1):
            train = config.train.model_copy(update={"stop_after_steps": (block + 1) * STEPS})
            run.config = config.model_copy(update={"train": train})
            run.train()
            bare.append(_seconds(bare_step, platform))
            lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-STEPS:]
            ours.append(statistics.median(json.loads(line)["seconds"] for line in lines))
        return ours[1:], bare[1:]  # the first block of each warms up
    finally:
        distributed.stop()


def _seconds(step: Any, platform: Any) -> float:
    laps = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        platform.synchronize()
        laps.append(time.perf_counter() - begin)
    return statistics.median(laps)


def make_bare_step(config: Any, platform: Any) -> Any:
    """A step of the bare loop, on a model of its own."""
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_davinci.model.build import build_model

    (model,) = build_model(config, platform)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=1e-3,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=config.train.precision == "bf16",
            use_distributed_optimizer=True,
        ),
        [wrapped],
    )
    batches = torch.randint(0, 4096, (BATCH // MICRO, MICRO, LENGTH + 1), device=platform.device)
    schedule = get_forward_backward_func()

    def forward_step(pieces: Any, chunk: Any) -> Any:
        piece = next(pieces)
        losses = chunk(piece[:, :-1], None, None, labels=piece[:, 1:].contiguous())
        return losses, lambda x: (x.sum(), torch.tensor(x.numel(), dtype=torch.int, device=x.device), {})

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[wrapped],
            num_microbatches=len(batches),
            seq_length=LENGTH,
            micro_batch_size=MICRO,
            forward_only=False,
        )
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
