"""Saves and exports with a fault at a chosen file-system call, in one rank, and what is to hold after each.

What is good is decided here by other code than the package's: a folder with a manifest, whose files are those of the
manifest, with their sizes and digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.faults.mutants import apply
from tests.faults.shim import Mode, armed
from tests.tiny import tiny_config

GROWING = ("write", "mkdir", "rename", "fsync", "open", "truncate", "link")
HALVES = (Mode.SHORT, Mode.HALF_THEN_DEAD)
BROKEN = (Mode.DEAD, Mode.IO_ERROR, Mode.NO_SPACE, Mode.FULL_FROM_HERE)


def content(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole."""
    found = content(checkpoint)
    if "manifest.json" not in found:
        return False
    del found["manifest.json"]
    try:
        listed = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
    except (ValueError, KeyError):
        return False
    return found == {name: entry["sha256"] for name, entry in listed.items()} and len(found) > 3


def visible(checkpoints: Path) -> list[Path]:
    """Folders that look like checkpoints, newest first."""
    there = [path for path in checkpoints.iterdir() if path.name.startswith("step-") and "." not in path.name]
    return sorted(there, reverse=True)


def good_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints that are whole, newest first."""
    return [int(path.name[5:]) for path in visible(checkpoints) if is_good(path)]


def plan(names: list[str], part: int, of: int) -> Iterator[tuple[int, Mode]]:
    """Every call with every fault that can meet it; of them every `of`-th, from `part` on."""
    trials = []
    for call, name in enumerate(names, start=1):
        trials += [(call, Mode.DEAD), (call, Mode.IO_ERROR)]
        if name.startswith(GROWING):
            trials += [(call, Mode.NO_SPACE), (call, Mode.FULL_FROM_HERE)]
        if name.startswith(("write", "pwrite")):
            trials += [(call, mode) for mode in HALVES]
    yield from trials[part::of]


class State:
    """A model and its optimizer in this rank, and a saver of them.

    Args:
        root: Where data and checkpoints lie.
        background: Save in the background.
    """

    def __init__(
        self, root: Path, *, background: bool = True, model: dict[str, Any] | None = None, **parallel: int
    ) -> None:
        from megatron_davinci.model.build import build_model
        from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
        from megatron_davinci.platform import distributed
        from megatron_davinci.platform.device import choose
        from megatron_davinci.train.step import wrap_model

        self.checkpoints = root / "checkpoints"
        self.config = tiny_config(
            root,
            parallel=parallel,
            model=model or {},
            checkpoint={"async_save": background, "keep": 2, "stop_after_failures": 10**6},
        )
        platform = choose("cpu", threads=1)
        distributed.start(platform, **self.config.parallel.groups, timeout_seconds=60)
        self.chunks = build_model(self.config, platform)
        wrapped = wrap_model(self.chunks, self.config)
        self.optimizer = build_optimizer(self.config, wrapped)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        set_hyperparameters(self.optimizer, learning_rate=0.0, weight_decay=0.0)
        self.optimizer.step()

    def plan_once(self) -> None:
        """Have what is saved planned by the first save alone: it touches no file, and takes most of the time."""
        from megatron_davinci.train import saver

        take, planned = saver.take, []

        def again(chunks: Any, optimizer: Any, folder: Path, gathered: Any = None) -> Any:
            if not planned:
                with armed(self.checkpoints, 0, Mode.COUNT) as calls:
                    planned.append(take(chunks, optimizer, folder, gathered))
                assert calls.names == []
            writer = planned[0].writer
            writer.checkpoint_dir, writer.path = str(folder), folder
            writer.write_buckets = [
                (str(folder / name), name, items) for _, name, items in writer.write_buckets
            ]
            return replace(planned[0])

        saver.take = again

    def save(self, step: int) -> Any:
        """Save, wait, and return the outcome."""
        from megatron_davinci.errors import EnvironmentProblem
        from megatron_davinci.train.saver import Saver

        saver = Saver(self.checkpoints, self.config.checkpoint)
        description = {
            "step": step,
            "consumed_samples": 8 * step,
            "model": self.config.model.model_dump(mode="json"),
        }
        with suppress(EnvironmentProblem):
            saver.save(self.chunks, self.optimizer, description)
            saver.finish()
        return next(iter(saver.news()), None)


def order(root: str, mutant: str = "") -> list[str]:
    """What is wrong with the order in which a save syncs what it does: a power cut may undo what is not synced."""
    state = State(Path(root))
    apply(mutant)
    with armed(state.checkpoints, 0, Mode.COUNT) as calls:
        state.save(10)
    folder, unsynced, wrong, visible = str(state.checkpoints), set(), [], None
    for name, path in zip(calls.names, calls.paths, strict=True):
        if name in ("write", "rename"):
            unsynced.add(path if name == "write" else str(Path(path).parent))
        elif name == "fsync":
            unsynced.discard(path)
        if name == "rename" and path == f"{folder}/step-00000010":
            visible = sorted(path for path in unsynced if path != folder)
            wrong += [f"visible before it is synced: {path}" for path in visible]
    if visible is None:
        wrong.append("never visible")
    return wrong + [f"never synced: {path}" for path in unsynced]


def saves(
    root: str, step: int, part: int, of: int, background: bool = True, mutant: str = ""
) -> tuple[int, dict[str, int]]:
    """Save `step` where 10 and 20 are there and something is left over, with a fault at one call after the other.

    Returns:
        How many calls a save makes, and how often each fault was met.
    """
    state = State(Path(root), background=background)
    state.plan_once()
    checkpoints, kept = state.checkpoints, Path(root) / "kept"
    for before in (10, 20):
        state.save(before)
    (checkpoints / ".step-00000015.tmp-dead" / "state").mkdir(parents=True)
    (checkpoints / ".step-00000015.tmp-dead" / "state" / "half").write_bytes(b"half")
    shutil.copytree(checkpoints, kept)
    whole = {number: content(kept / f"step-{number:08d}") for number in (10, 20)}
    apply(mutant)

    def once(call: int, mode: Mode) -> Any:
        shutil.rmtree(checkpoints)
        shutil.copytree(kept, checkpoints)
        with armed(checkpoints, call, mode) as calls:
            outcome = state.save(step)
        return outcome, calls

    outcome, calls = once(0, Mode.COUNT)
    assert (
        outcome.failure is None
        and good_steps(checkpoints) == sorted({20, step} if step > 20 else {10, 20})[::-1]
    )
    met: Counter[str] = Counter()
    for number, (call, mode) in enumerate(plan(calls.names, part, of)):
        outcome, _ = once(call, mode)
        where = f"{mode.name} at call {call} of {calls.number} ({calls.names[call - 1]})"
        check_saved(checkpoints, outcome, step, whole, where)
        met[mode.name] += 1
        if number % 8 == 0:
            # The cause is gone: the next save that is due.
            assert state.save(step + 10).failure is None, where
            assert good_steps(checkpoints)[0] == step + 10, where
            left = [path.name for path in checkpoints.iterdir() if ".tmp-" in path.name]
            assert left == [], where
    return calls.number, dict(met)


def check_saved(
    checkpoints: Path, outcome: Any, step: int, whole: dict[int, dict[str, str]], where: str
) -> None:
    """What holds whatever has happened."""
    from megatron_davinci.train import checkpoint_files

    good = good_steps(checkpoints)
    assert len(good) == len(visible(checkpoints)), f"{where}: half-written and visible"
    chosen, _ = checkpoint_files.newest_good(checkpoints)
    assert chosen is not None and good and chosen.step == good[0] and good[0] in (20, step), where
    assert outcome is not None, where
    if outcome.failure is None:
        assert good[0] == max(step, 20) and step in good, f"{where}: said to be saved, and is not"
    for number, files in whole.items():
        folder = checkpoints / f"step-{number:08d}"
        if number == step or (number == 10 and step in good and not folder.exists()):
            continue  # written anew, or removed since a newer one is there
        assert content(folder) == files, f"{where}: step {number} was touched"


def killed(root: str, call: int, mode: int) -> None:
    """Save step 30 and be killed at a call."""
    state = State(Path(root), background=True)
    with armed(state.checkpoints, call, Mode(mode)):
        state.save(30)


def prepare(root: str) -> int:
    """Save steps 10 and 20; returns how many calls a save of step 30 makes."""
    state = State(Path(root))
    for step in (10, 20):
        state.save(step)
    kept = Path(root) / "kept"
    shutil.copytree(state.checkpoints, kept)
    with armed(state.checkpoints, 0, Mode.COUNT) as calls:
        state.save(30)
    shutil.rmtree(state.checkpoints)
    os.rename(kept, state.checkpoints)
    return calls.number


def on_two_ranks(root: str, faulty: int, part: int, of: int) -> dict[str, int]:
    """Save step 30 on two tensor-parallel ranks, one of which meets a fault at one call after the other.

    The sources of `tiny_settings` are there already: both ranks would write them.
    """
    import torch.distributed as dist

    state = State(Path(root), tensor=2)
    state.plan_once()
    rank, checkpoints, kept = dist.get_rank(), state.checkpoints, Path(root) / "kept"
    for step in (10, 20):
        state.save(step)
    if rank == 0:
        shutil.copytree(checkpoints, kept)
    dist.barrier()
    whole = {number: content(kept / f"step-{number:08d}") for number in (10, 20)}

    def once(call: int, mode: Mode) -> Any:
        if rank == 0:
            shutil.rmtree(checkpoints)
            shutil.copytree(kept, checkpoints)
        dist.barrier()
        with armed(checkpoints if rank == faulty else Path("/nowhere"), call, mode) as calls:
            outcome = state.save(30)
        return outcome, calls

    _, calls = once(0, Mode.COUNT)
    names: list[Any] = [calls.names]
    dist.broadcast_object_list(names, src=faulty)
    met: Counter[str] = Counter()
    for call, mode in plan(names[0], part, of):
        outcome, _ = once(call, mode)
        if rank == 0:
            check_saved(checkpoints, outcome, 30, whole, f"{mode.name} at call {call} of rank {faulty}")
        met[mode.name] += 1
        dist.barrier()
    return dict(met)


def exports(root: str, part: int, of: int) -> tuple[int, dict[str, int]]:
    """Export a checkpoint, with a fault at one call after the other."""
    from megatron_davinci.convert import export
    from megatron_davinci.errors import DavinciError

    export.SHARD_BYTES = 20_000  # several shards and their index
    state = State(Path(root))
    assert state.save(10).failure is None
    out = Path(root) / "hf" / "step-00000010"
    model = state.config.model.model_dump(mode="json")

    def attempt() -> DavinciError | None:
        try:
            export.export_to_hf(state.checkpoints / "step-00000010" / "state", model, out, eod_id=0)
        except DavinciError as error:
            return error
        return None

    def once(call: int, mode: Mode) -> Any:
        shutil.rmtree(out.parent, ignore_errors=True)
        with armed(out.parent, call, mode) as calls:
            failure = attempt()
        return failure, calls

    failure, calls = once(0, Mode.COUNT)
    assert failure is None
    whole = content(out)
    assert "model.safetensors.index.json" in whole and len(whole) > 4
    met: Counter[str] = Counter()
    for call, mode in plan(calls.names, part, of):
        failure, _ = once(call, mode)
        where = f"{mode.name} at call {call} of {calls.number} ({calls.names[call - 1]})"
        assert not out.exists() or content(out) == whole, where
        assert out.exists() or failure is not None, where
        if not out.exists():
            # What an interrupted one has left is gone on with.
            assert attempt() is None and content(out) == whole, f"{where}, then tried again"
            assert [path.name for path in out.parent.iterdir() if path != out] == [], where
        met[mode.name] += 1
    return calls.number, dict(met)
