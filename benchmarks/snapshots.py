"""Snapshots in memory against checkpoints on disk: the stall of taking one, and the time to go on from one.

Two data-parallel ranks, each a node of its own, train a model on random tokens. In one run snapshots and checkpoints
that training waits for are taken in turn, in a second one checkpoints in the background. The stall is all that
training waits for: of a snapshot the copy, and what is left of digest and parity when the next step is over. Then a
run is killed where a snapshot and a checkpoint are of one step, and started again from memory, from disk, and from
memory of which one node has lost its part, in turn. What is timed is finding the state, checking it and loading it,
from the moment that all ranks are there. Files are in the page cache, so the disk is as fast as it can be.

At last a run is killed at random moments, again and again, and the steps on record that each kill has lost are
counted.

figures: snapshot_stall_seconds, snapshot_stall_seconds_per_gb, sync_checkpoint_stall_seconds,
    async_checkpoint_stall_seconds, snapshot_to_sync_stall, resume_from_memory_seconds, resume_from_parity_seconds,
    resume_from_disk_seconds, memory_to_disk_resume, state_gb (both ranks), kills, steps_between_snapshots,
    most_steps_lost
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

RANKS, LENGTH, SNAPSHOT, CHECKPOINT = 2, 128, 3, 4


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(json.loads(arguments.rank))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.hidden_size, arguments.seed)
        small = Bench(Path(folder), 64, arguments.seed)
        figures: dict[str, float] = {}
        for part in (
            lambda: stalls(bench),
            lambda: resumes(bench, arguments.rounds),
            lambda: kills(small, arguments.kills),
        ):
            figures |= part()
            print(f"measured: {', '.join(figures)}", file=sys.stderr, flush=True)
    common.write(arguments.json, figures, {"name": "the project's own checkpoints", "ranks": RANKS})


class Bench:
    """Starts ranks of runs in one folder.

    Args:
        folder: Where data and runs are.
        hidden_size: Of the model.
        seed: Of data and runs.
    """

    def __init__(self, folder: Path, hidden_size: int, seed: int) -> None:
        self.folder, self.hidden_size, self.seed = folder, hidden_size, seed

    def config(self, name: str, steps: int, snapshots: dict[str, Any], checkpoint: dict[str, Any]) -> Any:
        """A run's settings."""
        from megatron_davinci.data import IndexedDatasetWriter

        if not (self.folder / "text.idx").exists():
            with IndexedDatasetWriter(self.folder / "text", np.uint16) as writer:
                writer.add_document(np.random.default_rng(self.seed).integers(0, 4096, size=400_000))
        return {
            "run": {"directory": str(self.folder / name), "seed": self.seed},
            "model": {
                "num_layers": 4,
                "hidden_size": self.hidden_size,
                "num_attention_heads": 8,
                "num_query_groups": 2,
                "ffn_hidden_size": 3 * self.hidden_size,
                "vocab_size": 4096,
                "max_sequence_length": LENGTH,
            },
            "parallel": {"device": "cpu"},
            "data": {"sequence_length": LENGTH, "sources": {"text": {"path": str(self.folder / "text")}}},
            "curriculum": [
                {
                    "name": "all",
                    "tokens": steps * RANKS * LENGTH,
                    "mixture": {"text": 1},
                    "global_batch_size": RANKS,
                    "learning_rate": {"peak": 1e-3},
                }
            ],
            "train": {"micro_batch_size": 1, "precision": "fp32", "threads": 1},
            "checkpoint": {"every_steps": None, **checkpoint},
            "snapshots": {"ranks_per_node": 1, "keep_alive_seconds": 120, **snapshots},
            "logging": {"progress": "none", "tensorboard": False},
        }

    def start(self, task: dict[str, Any]) -> list[subprocess.Popen[str]]:
        """Start the ranks of a task."""
        port = common.free_port()
        return [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", json.dumps(task)],
                env={**os.environ, **common.rank_environment(rank, RANKS, port)},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(RANKS)
        ]

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Run a task and return what rank 0 measured."""
        ranks = self.start(task)
        said, _ = ranks[0].communicate(timeout=600)
        codes = [rank.wait() for rank in ranks]
        if codes != [0] * RANKS and "die" not in task:
            raise RuntimeError(f"ranks ended with {codes}")
        return json.loads(said.splitlines()[-1]) if said else {}


def stalls(bench: Bench) -> dict[str, float]:
    """What training waits for."""
    steps = 5 * CHECKPOINT
    both = {"every_steps": SNAPSHOT}, {"every_steps": CHECKPOINT, "async_save": False}
    waiting = bench.run({"config": bench.config("sync", steps, *both), "measure": True})
    beside = {"every_steps": CHECKPOINT, "async_save": True}
    background = bench.run(
        {"config": bench.config("async", steps, {"every_steps": None}, beside), "measure": True}
    )
    # The first of each touches its memory for the first time, or imports; the last save is the run's end.
    snapshot = statistics.median(waiting["snapshot"][1:])
    save = statistics.median(waiting["save"][1:-1])
    size = waiting["bytes"] * RANKS / 1e9
    return {
        "state_gb": size,
        "snapshot_stall_seconds": snapshot,
        "snapshot_stall_seconds_per_gb": snapshot / size,
        "sync_checkpoint_stall_seconds": save,
        "async_checkpoint_stall_seconds": statistics.median(background["save"][1:-1]),
        "snapshot_to_sync_stall": snapshot / save,
    }


def resumes(bench: Bench, rounds: int) -> dict[str, float]:
    """Finding and loading the state of one step, from each place."""
    step = SNAPSHOT * CHECKPOINT
    both = {"every_steps": SNAPSHOT}, {"every_steps": CHECKPOINT, "async_save": False}
    config = bench.config("killed", 2 * step, *both)
    bench.run({"config": config, "die": step + 2})
    disk = {**config, "snapshots": {"every_steps": None}}
    found: dict[str, list[float]] = {"memory": [], "disk": [], "parity": []}

    def look(kind: str, how: dict[str, Any]) -> None:
        answer = bench.run({"config": how, "resume": True})
        if answer["step"] != step or answer["in_memory"] != (kind != "disk"):
            raise RuntimeError(f"from {kind}: {answer}")
        found[kind].append(answer["seconds"])

    for _ in range(rounds):
        look("memory", config)
        look("disk", disk)
    end_keeper(Path(config["run"]["directory"]), 1)
    for _ in range(rounds):
        look("parity", config)
    end_keeper(Path(config["run"]["directory"]), 0)
    seconds = {kind: statistics.median(several) for kind, several in found.items()}
    return {
        **{f"resume_from_{kind}_seconds": value for kind, value in seconds.items()},
        "memory_to_disk_resume": seconds["memory"] / seconds["disk"],
    }


def kills(bench: Bench, count: int) -> dict[str, float]:
    """Steps on record that a kill at a random moment has lost."""
    chance = random.Random(bench.seed)
    config = bench.config("kills", 1_000_000, {"every_steps": SNAPSHOT}, {})
    run, lost = Path(config["run"]["directory"]), []
    for _ in range(count):
        before = recorded(run)
        ranks = bench.start({"config": config})
        while recorded(run) < before + SNAPSHOT + 2:
            if ranks[0].poll() is not None:
                raise RuntimeError("the run ended by itself")
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1))
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.wait()
        last = recorded(run)
        found = bench.run({"config": config, "resume": True})
        lost.append(last - found["step"])
    for node in range(RANKS):
        end_keeper(run, node)
    return {"kills": count, "steps_between_snapshots": SNAPSHOT, "most_steps_lost": max(lost, default=0)}


def recorded(run: Path) -> int:
    """The last step on record."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def end_keeper(run: Path, node: int) -> None:
    """End the process that keeps the snapshots of a node."""
    import psutil

    from megatron_davinci.platform.snapshot_memory import boot_id, keeper_address
    from megatron_davinci.train.snapshot_names import identity

    address = keeper_address(identity(run) or "", f"{boot_id()}/{node}")
    for process in psutil.process_iter(["cmdline"]):
        if address in (process.info["cmdline"] or []):
            process.kill()
            process.wait(10)


def run_rank(task: dict[str, Any]) -> None:
    """What a rank does; rank 0 prints what it measured."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    config = validate(task["config"], where="benchmarks/snapshots.py")
    distributed.start(choose("cpu", threads=1), seed=config.run.seed)
    from megatron_davinci.train.loop import TrainingRun

    taken: dict[str, Any] = {}
    if task.get("resume"):
        taken = time_resume(config)
    else:
        run = TrainingRun(config, choose("cpu", threads=1))
        if task.get("measure"):
            taken = time_stalls(run)
        if "die" in task:
            die_in(run, task["die"])
        run.train()
    if os.environ["RANK"] == "0":
        print(json.dumps(taken), flush=True)
    if task.get("resume"):
        os._exit(0)  # as a kill would: what is in memory stays
    distributed.stop()


def time_resume(config: Any) -> dict[str, Any]:
    """Seconds to find and to load the state, between moments at which all ranks are there."""
    import torch.distributed as dist

    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.loop import TrainingRun
    from megatron_davinci.train.snapshots import Snapshots

    seconds, newest, resume = [], Snapshots.newest, TrainingRun._resume

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            dist.barrier()
            begin = time.perf_counter()
            answer = function(*arguments)
            dist.barrier()
            seconds.append(time.perf_counter() - begin)
            return answer

        return call

    found: list[Any] = []
    Snapshots.newest = timed(newest)  # type: ignore[method-assign]
    TrainingRun._resume = timed(lambda run, at: (found.append(at), resume(run, at)))  # type: ignore[method-assign]
    run = TrainingRun(config, choose("cpu", threads=1))
    return {"seconds": sum(seconds), "step": run.step, "in_memory": "memory" in str(found[0].folder)}


def time_stalls(run: Any) -> dict[str, Any]:
    """Have what training waits for noted, each from a moment at which all ranks are there."""
    import torch.distributed as dist

    taken: dict[str, Any] = {"snapshot": [], "save": []}
    take, settle, save = run.snapshots.take, run.snapshots.settle, run.save

    def timed_take(position: Any) -> None:
        dist.barrier()
        begin = time.perf_counter()
        take(position)
        taken["snapshot"].append(time.perf_counter() - begin)
        taken["bytes"] = run.snapshots.state_bytes

    def timed_settle() -> None:
        if run.snapshots.in_flight:
            dist.barrier()
        begin = time.perf_counter()
        flying = run.snapshots.in_flight
        settle()
        if flying:
            taken["snapshot"][-1] += time.perf_counter() - begin

    def timed_save() -> None:
        dist.barrier()
        begin = time.perf_counter()
        save()
        taken["save"].append(time.perf_counter() - begin)

    run.snapshots.take, run.snapshots.settle, run.save = timed_take, timed_settle, timed_save
    return taken


def die_in(run: Any, step: int) -> None:
    """Have every rank killed in a step."""
    original = run._step

    def mortal(plan: Any, *rest: Any) -> Any:
        if plan.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(plan, *rest)

    run._step = mortal


if __name__ == "__main__":
    main()
