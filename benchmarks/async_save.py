"""What a checkpoint costs training: saved in the background against one that training waits for.

One rank trains a model on random tokens. In one run every other save is in the background and the ones between are
waited for, so that both are of the same state, on the same machine, in the same minute. The stall is the time that
training waits in the call. Then runs of `--steps` steps, with a save in the background every `--every` steps and with
none, in turn; their time from the first step to the end of the last, which the writer makes longer too where it takes
the processor. The last save, which every run makes, is not in it.

figures: async_stall_fraction (of the waited-for save), async_stall_seconds, sync_save_seconds,
    async_stall_seconds_per_gb, sync_save_seconds_per_gb, state_gb, saves_of_each_kind, wall_overhead_fraction,
    seconds_without, seconds_with, saves, step_seconds
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

LENGTH = 128


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="runs with saves and without, each")
    parser.add_argument("--task", help="for the ranks that this starts")
    arguments = parser.parse_args()
    if arguments.task:
        rank(json.loads(arguments.task))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def measured(run: str, every: int | None, steps: int) -> dict[str, Any]:
            task = settings(folder, run, arguments.hidden_size, arguments.seed, every, steps)
            return start(task, alternate=run == "alternating")

        stalls = measured("alternating", 4, 4 * 10)
        print("measured: stalls", file=sys.stderr, flush=True)
        took: dict[str, list[float]] = {"with": [], "without": []}
        for number in range(arguments.rounds):
            for kind, every in (("without", None), ("with", arguments.every)):
                one = measured(f"{kind}-{number}", every, arguments.steps)
                took[kind].append(one["seconds"])
                print(f"measured: {kind}, {one['seconds']:.1f} s", file=sys.stderr, flush=True)
    size = stalls["bytes"] / 1e9
    # The first of each touches its memory for the first time.
    background, waited = (statistics.median(stalls[kind][1:]) for kind in ("async", "sync"))
    seconds = {kind: statistics.median(several) for kind, several in took.items()}
    common.write(
        arguments.json,
        {
            "async_stall_fraction": background / waited,
            "async_stall_seconds": background,
            "sync_save_seconds": waited,
            "async_stall_seconds_per_gb": background / size,
            "sync_save_seconds_per_gb": waited / size,
            "state_gb": size,
            "saves_of_each_kind": len(stalls["sync"]) - 1,
            "wall_overhead_fraction": seconds["with"] / seconds["without"] - 1,
            "seconds_without": seconds["without"],
            "seconds_with": seconds["with"],
            "saves": (arguments.steps - 1) // arguments.every,
            "step_seconds": seconds["without"] / arguments.steps,
        },
        {"name": "the project's own save that training waits for"},
    )


def settings(folder: Path, run: str, hidden: int, seed: int, every: int | None, steps: int) -> dict[str, Any]:
    """A run's settings; its data is written if it is not there."""
    from megatron_davinci.data import IndexedDatasetWriter

    if not (folder / "text.idx").exists():
        with IndexedDatasetWriter(folder / "text", np.uint16) as writer:
            writer.add_document(np.random.default_rng(seed).integers(0, 4096, size=400_000))
    return {
        "run": {"directory": str(folder / run), "seed": seed},
        "model": {
            "num_layers": 6,
            "hidden_size": hidden,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "ffn_hidden_size": 3 * hidden,
            "vocab_size": 4096,
            "max_sequence_length": LENGTH,
        },
        "parallel": {"device": "cpu"},
        "data": {"sequence_length": LENGTH, "sources": {"text": {"path": str(folder / "text")}}},
        "curriculum": [
            {
                "name": "all",
                "tokens": steps * LENGTH,
                "mixture": {"text": 1},
                "global_batch_size": 1,
                "learning_rate": {"peak": 1e-3},
            }
        ],
        "train": {"micro_batch_size": 1, "precision": "fp32", "threads": 1},
        "checkpoint": {"every_steps": every, "keep": 1},
        "logging": {"progress": "none", "tensorboard": False},
    }


def start(task: dict[str, Any], *, alternate: bool) -> dict[str, Any]:
    """Train in a process of its own, and return what it measured."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps({"settings": task, "alternate": alternate})],
        env={**os.environ, **common.rank_environment(0, 1, common.free_port())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def rank(task: dict[str, Any]) -> None:
    """What the process does that trains; it prints what it measured."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.loop import TrainingRun

    config = validate(task["settings"], where="benchmarks/async_save.py")
    platform = choose("cpu", threads=1)
    distributed.start(platform, seed=config.run.seed)
    run = TrainingRun(config, platform)
    taken: dict[str, Any] = {"async": [], "sync": []}
    if task["alternate"]:
        alternate(run, taken)
    step, times = run._step, []

    def timed(*given: Any) -> Any:
        times.append(time.perf_counter())
        result = step(*given)
        times.append(time.perf_counter())
        return result

    run._step = timed  # type: ignore[method-assign]
    run.train()
    distributed.stop()
    print(json.dumps({**taken, "seconds": times[-1] - times[0]}), flush=True)


def alternate(run: Any, taken: dict[str, Any]) -> None:
    """Have every other save be waited for, and note how long each kept training."""
    save, saver = run.save, run.saver

    def timed() -> None:
        # Each begins with no other at work: what is compared is one save with one save.
        saver._settle()
        kind = "sync" if len(taken["async"]) > len(taken["sync"]) else "async"
        saver._config = saver._config.model_copy(update={"async_save": kind == "async"})
        begin = time.perf_counter()
        save()
        taken[kind].append(time.perf_counter() - begin)
        if kind == "sync":
            newest = saver.newest
            taken["bytes"] = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())

    run.save = timed


if __name__ == "__main__":
    main()
