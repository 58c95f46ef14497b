"""Checkpoint folders: named by step, made visible by one rename, verified before they are trusted.

checkpoints/step-00000100/
    manifest.json      what the checkpoint is, and size and SHA-256 of every other file in it
    state/             Megatron-Core's `torch_dist` files
checkpoints/LATEST     a hint for people; nothing is decided by it
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.errors import CheckpointError
from megatron_davinci.files import disk_errors, file_digest, fsync_folder, write_atomically

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_DIGEST_SUFFIX = ".sha256"


class DigestFile(io.FileIO):
    """A file that hashes the bytes as they are handed to `write`, and leaves the digest beside it when closed.

    The digest is of what was meant to be written: damage between here and the disk shows when it is verified.
    """

    def __init__(self, name: str, mode: str = "wb") -> None:
        super().__init__(name, mode)
        self._digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, as a buffered file would.

        What the file system refused is kept in `failure`: torch's archive writer forgets it and raises its own.
        """
        view = memoryview(data).cast("B")
        self._digest.update(view)
        try:
            self._write_all(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += super().write(view[written:]) or 0

    def close(self) -> None:
        """Close, and write the digest."""
        if not self.closed:
            super().close()
            if "w" in self.mode or "+" in self.mode:
                Path(f"{self.name!s}{_DIGEST_SUFFIX}").write_text(self._digest.hexdigest())


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps taken when it was saved."""
        return int(self.manifest["step"])

    @property
    def consumed_samples(self) -> int:
        """Samples consumed when it was saved."""
        return int(self.manifest["consumed_samples"])

    @property
    def state(self) -> Path:
        """The folder that Megatron-Core reads."""
        return self.folder / "state"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def begin(checkpoints: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written in, beside where it will be, and drop what a crash left."""
    with disk_errors(checkpoints, "writing a checkpoint"):
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints.glob(".step-*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = checkpoints / f".step-{step:08d}.tmp-{uuid.uuid4().hex[:8]}"
        (temporary / "state").mkdir(parents=True)
    return temporary


def commit(temporary: Path, target: Path, description: dict[str, Any], *, latest: bool = True) -> Checkpoint:
    """Write the manifest and make the checkpoint visible.

    Args:
        temporary: The folder from `begin`, with all files in place.
        target: Its final name.
        description: What the checkpoint is; `files` is added.
        latest: Note it as the newest of a run.

    Returns:
        The visible checkpoint. A checkpoint of the same step that was there is replaced.
    """
    with disk_errors(target, "writing a checkpoint"):
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file() and p.suffix != _DIGEST_SUFFIX):
            sidecar = path.with_name(path.name + _DIGEST_SUFFIX)
            if sidecar.exists():
                digest = sidecar.read_text()
                sidecar.unlink()
            else:
                # Small files that Megatron-Core's rank 0 writes by itself (common.pt, .metadata).
                digest = file_digest(path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
        manifest = {"format": FORMAT, **description, "files": files}
        write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1))
        for folder in (temporary / "state", temporary):
            fsync_folder(folder)
        if target.exists():
            replaced = target.with_name(f".{target.name}.tmp-replaced-{uuid.uuid4().hex[:8]}")
            os.rename(target, replaced)
            os.rename(temporary, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, target)
        fsync_folder(target.parent)
    if latest:
        write_atomically(target.parent / "LATEST", target.name + "\n")
    return Checkpoint(target, manifest)


def read(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint and check it against its manifest.

    Args:
        folder: A `step-XXXXXXXX` folder.
        verify: Hash every file; sizes and names are always checked.

    Raises:
        CheckpointError: It is missing or damaged; the message names the file.
    """
    path = folder / "manifest.json"
    again = "use an older checkpoint of the run, or copy this one again from where it is whole"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            "This is not a complete checkpoint.", where=folder, found="no manifest.json", do=again
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "The checkpoint's manifest cannot be read.", where=path, found=error, do=again
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            "The checkpoint's manifest is of another format.",
            where=path,
            found=manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__,
            expected=f"format {FORMAT}",
            do="use the version of megatron-davinci that wrote it",
        )
    for field, kind in (("step", int), ("consumed_samples", int), ("model", dict), ("files", dict)):
        if not isinstance(manifest.get(field), kind):
            raise CheckpointError(
                "The checkpoint's manifest lacks a field.",
                where=path,
                found=field,
                expected=kind.__name__,
                do=again,
            )
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    listed: dict[str, Any] = manifest["files"]
    if present != set(listed):
        missing, extra = sorted(set(listed) - present), sorted(present - set(listed))
        raise CheckpointError(
            "The checkpoint's files are not those of its manifest.",
            where=folder,
            found=f"missing: {', '.join(missing) or 'none'}\nunlisted: {', '.join(extra) or 'none'}",
            do=again,
        )
    for name, entry in listed.items():
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                "A file of the checkpoint has the wrong length.",
                where=folder / name,
                found=f"{size:,} bytes",
                expected=f"{entry['bytes']:,} bytes",
                do=again,
            )
        if verify and (digest := file_digest(folder / name)) != entry["sha256"]:
            raise CheckpointError(
                "A file of the checkpoint is damaged.",
                where=folder / name,
                found=f"sha256 {digest}",
                expected=f"sha256 {entry['sha256']}",
                do=again,
            )
    return Checkpoint(folder, manifest)


def steps(checkpoints: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_good(checkpoints: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones."""
    problems: list[CheckpointError] = []
    for folder in steps(checkpoints):
        try:
            return read(folder), problems
        except CheckpointError as error:
            problems.append(error)
    return None, problems


def prune(checkpoints: Path, keep: int, newest: int) -> None:
    """Remove all but the newest `keep` checkpoints of steps up to `newest`.

    What lies beyond `newest`, the step that was saved last, was passed over when the run was resumed: it is damaged,
    takes no place among those that are kept, and is left for somebody to look at. A checkpoint that cannot be
    removed is no reason to stop a run.
    """
    for folder in [path for path in steps(checkpoints) if _step_of(path) <= newest][keep:]:
        # Renamed first, so that a crash in mid-removal leaves no folder that looks like a checkpoint.
        doomed = folder.with_name(f".{folder.name}.tmp-pruned-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(folder, doomed)
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
