"""A folder of safetensors files: written beside its place, gone on with after an interruption, appears whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_davinci.convert.tensor_files import INDEX, SINGLE, Planned, content_of, header_of
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import disk_errors, fsync_folder, write_json
from megatron_davinci.platform.background_process import try_lock

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
def only_writer(out: Path, doing: str) -> Iterator[None]:
    """Keep other processes from writing `out` while the block runs. Its parents are made.

    Args:
        out: A folder that is not there yet.
        doing: What is done, for messages: `exporting`.

    Raises:
        ConfigError: `out` is there already, or another process is writing it.
        EnvironmentProblem: The disk is full or failing.
    """
    with disk_errors(out, doing):
        _check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock")
        held = _locked(lock)
    if held is None:
        raise ConfigError(
            "Another process is writing this folder.", where=out, do="wait for it, or choose another"
        )
    try:
        # It may have appeared while the lock was waited for.
        _check_free(out)
        yield
    finally:
        # A failing disk may keep it; nobody holds a lock on it then, and the next one takes it.
        with suppress(OSError):
            lock.unlink(missing_ok=True)
        os.close(held)


def _check_free(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError("The folder is there already.", where=out, do="choose another, or remove it")


def _locked(lock: Path) -> int | None:
    """A descriptor that holds a lock, whose file goes with it; None where another process has it."""
    while (held := try_lock(lock)) is not None:
        try:
            if os.path.samestat(os.fstat(held), os.stat(lock)):
                return held
        except FileNotFoundError:
            pass
        os.close(held)  # of a file that its last holder has removed meanwhile
    return None


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what becomes `out`; it is kept where the block fails, so that it can be gone on with.

    The folder is hidden, and its files of weights have no name that anything would load until they are whole.

    Raises:
        ConfigError: `out` is there already, or another process is writing it.
        EnvironmentProblem: The disk is full or failing.
    """
    with only_writer(out, "exporting"), disk_errors(out, "exporting"):
        folder = out.with_name(f".{out.name}.partial")
        folder.mkdir(exist_ok=True)
        yield folder
        (folder / RECORD).unlink(missing_ok=True)
        fsync_folder(folder)
        folder.rename(out)
        fsync_folder(out.parent)


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
        if found["of"] != digest or not isinstance(found["files"], list):
            raise ValueError("of something else")
    except (OSError, ValueError, KeyError, TypeError):
        found = {"of": digest, "files": []}
    # Small files are written anew: an earlier try may have been told of another tokenizer.
    kept = {RECORD, *found["files"]} if found["files"] else set()
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    return found
