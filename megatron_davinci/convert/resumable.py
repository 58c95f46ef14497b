"""A folder of safetensors files: written beside its place, gone on with after an interruption, appears whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_davinci.convert.tensor_files import INDEX, SINGLE, Planned, content_of, header_of
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import disk_errors, fsync_folder, write_json

RECORD = "conversion.json"
Progress = Callable[[int, int], None]


class Item(NamedTuple):
    """Tensors that are made together.

    Attributes:
        planned: What they will be.
        make: Makes them, in that order.
    """

    planned: Sequence[Planned]
    make: Callable[[], Sequence[Tensor]]

    @property
    def bytes(self) -> int:
        """Their size."""
        return sum(one.bytes for one in self.planned)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what becomes `out`; it is kept where the block fails, so that it can be gone on with.

    The folder is hidden, and its files of weights have no name that anything would load until they are whole.

    Raises:
        ConfigError: `out` is there already, or another process is writing it.
        EnvironmentProblem: The disk is full or failing.
    """
    with disk_errors(out, "exporting"):
        there = out.exists()
    if there:
        raise ConfigError(
            "The export's folder is there already.", where=out, do="choose another, or remove it"
        )
    folder, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    with disk_errors(out, "exporting"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    "Another process is writing this export.", where=out, do="wait for it, or choose another"
                ) from None
            try:
                folder.mkdir(exist_ok=True)
                yield folder
                (folder / RECORD).unlink(missing_ok=True)
                fsync_folder(folder)
                folder.rename(out)
                fsync_folder(out.parent)
            finally:
                lock.unlink(missing_ok=True)


def discard(out: Path) -> None:
    """Remove what an interrupted export to `out` has left."""
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)


def write_tensors(
    folder: Path,
    items: Sequence[Item],
    identity: dict[str, Any],
    shard_bytes: int,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write tensors to files of bounded size, with an index when there is more than one.

    Files that an earlier try has finished are left as they are, if it was about the same thing.

    Args:
        folder: The folder.
        items: The tensors, in the order in which they are written.
        identity: What is converted, and how; JSON.
        shard_bytes: A file is at most that long, or holds one item.
        progress: Is told bytes done, and bytes in all.
    """
    shards = _cut(items, shard_bytes)
    names = [
        SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    finished = _finished(folder, identity, [one.name for item in items for one in item.planned])
    total, done = sum(item.bytes for item in items), 0
    for name, shard in zip(names, shards, strict=True):
        planned = [one for item in shard for one in item.planned]
        header = header_of(planned)
        size = len(header) + sum(one.bytes for one in planned)
        path = folder / name
        if name in finished["files"] and path.exists() and path.stat().st_size == size:
            done += size - len(header)
            progress(done, total)
            continue
        temporary = folder / f"{name}.partial"
        with open(temporary, "wb", buffering=0) as file:
            _write(file, memoryview(header))
            for item in shard:
                for tensor in item.make():
                    _write(file, content_of(tensor))
                done += item.bytes
                progress(done, total)
            os.fsync(file.fileno())
        temporary.rename(path)
        finished["files"].append(name)
        write_json(folder / RECORD, finished)
    if len(shards) > 1:
        weight_map = {
            one.name: name
            for name, shard in zip(names, shards, strict=True)
            for item in shard
            for one in item.planned
        }
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write(file: Any, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += file.write(content[done:])


def _cut(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    return shards


def _finished(folder: Path, identity: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What an earlier try has left; nothing, and an empty folder, if it was about something else."""
    text = json.dumps([identity, names], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        found: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        if found["of"] == digest and isinstance(found["files"], list):
            for left in folder.glob(".*.tmp-*"):
                left.unlink()  # of a small file whose writing was interrupted
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for path in folder.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return {"of": digest, "files": []}
