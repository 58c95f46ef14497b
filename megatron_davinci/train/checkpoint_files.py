"""Checkpoint folders: named by step, made visible by one rename, verified before they are trusted.

checkpoints/step-00000100/
    manifest.json      what the checkpoint is, and size and SHA-256 of every other file in it
    state/             Megatron-Core's `torch_dist` files
checkpoints/LATEST     a hint for people; nothing is decided by it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.errors import CheckpointError, EnvironmentProblem
from megatron_davinci.files import (
    disk_errors,
    exchange,
    file_digest,
    fsync_folder,
    make_private_folder,
    write_atomically,
)

FORMAT = 2
"""Since 2 the manifest has a digest of itself."""
_NAME = re.compile(r"step-(\d{8,})")


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
    """Make the folder that a checkpoint is written in, beside where it will be, and drop what a crash left.

    Nobody but its owner can look into it while it is written.
    """
    with disk_errors(checkpoints, "writing a checkpoint"):
        make_private_folder(checkpoints)
        for leftover in checkpoints.glob(".step-*.tmp-*"):
            discard(leftover)
        for leftover in checkpoints.glob(".LATEST.tmp-*"):
            with contextlib.suppress(OSError):
                leftover.unlink()
        temporary = checkpoints / f".step-{step:08d}.tmp-{uuid.uuid4().hex[:8]}"
        os.mkdir(temporary, 0o700)
        os.mkdir(temporary / "state", 0o700)
    return temporary


def discard(folder: Path) -> None:
    """Remove a folder that is no checkpoint; what cannot be removed now is left for the next save."""
    with contextlib.suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def commit(
    temporary: Path,
    target: Path,
    description: dict[str, Any],
    files: Mapping[str, dict[str, Any]] | None = None,
    *,
    latest: bool = True,
) -> Checkpoint:
    """Write the manifest and make the checkpoint visible.

    Args:
        temporary: The folder from `begin`, with all files in place.
        target: Its final name.
        description: What the checkpoint is; `files` is added.
        files: Entries of the manifest that are known (`NewFiles.entries`), of files that are on the disk. What else
            is there is read for its digest.
        latest: Note it as the newest of a run.

    Returns:
        The visible checkpoint. A checkpoint of the same step that was there is replaced.

    Raises:
        EnvironmentProblem: The file system failed. Whether the checkpoint is visible then depends on where.
    """
    entries = dict(files or {})
    with disk_errors(target, "writing a checkpoint"):
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            name = path.relative_to(temporary).as_posix()
            if name not in entries:
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                entries[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        manifest = sealed({**description, "files": dict(sorted(entries.items()))})
        write_atomically(temporary / "manifest.json", text_of(manifest))
        # From here on the group may read it, where it may read the folder that it will be in.
        mode = 0o700 | (target.parent.stat().st_mode & 0o070)
        for folder in (temporary / "state", temporary):
            os.chmod(folder, mode)
            fsync_folder(folder)
        if target.exists():
            exchange(temporary, target)
            discard(temporary)
        else:
            os.rename(temporary, target)
        fsync_folder(target.parent)
    if latest:
        # Nothing rests on it, so a disk that has no room for it is no reason to lose the checkpoint.
        with contextlib.suppress(EnvironmentProblem):
            write_atomically(target.parent / "LATEST", target.name + "\n")
    return Checkpoint(target, manifest)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its format and the digest of all that it says, by which a change of it is found."""
    content = {**manifest, "format": FORMAT}
    content.pop("digest", None)
    return {**content, "digest": _digest_of(content)}


def text_of(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=1)


def _is_as_written(text: bytes, manifest: Mapping[str, Any]) -> bool:
    """Whether not even something without a meaning has changed, such as the `e` of a number's exponent to `E`."""
    of_a_branch = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"  # as branches wrote it before
    return text in (text_of(manifest).encode(), of_a_branch.encode(errors="surrogatepass"))


def _digest_of(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    # As it will be read: JSON knows no tuples.
    canonical = json.dumps(json.loads(json.dumps(rest)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint and check it against its manifest.

    Args:
        folder: A `step-XXXXXXXX` folder.
        verify: Hash every file; sizes and names are always checked.

    Raises:
        CheckpointError: It is missing or damaged; the message names the file.
    """
    path = folder / "manifest.json"
    check_owner(folder)
    again = "use an older checkpoint of the run, or copy this one again from where it is whole"
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(
            "This is not a complete checkpoint.", where=folder, found="no manifest.json", do=again
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "The checkpoint's manifest cannot be read.", where=path, found=error, do=again
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") not in (1, FORMAT):
        raise CheckpointError(
            "The checkpoint's manifest is of another format.",
            where=path,
            found=manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__,
            expected=f"format 1 or {FORMAT}",
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
    # One of format 1 has no digest: where there is one, it is the number of the format that changed.
    has_digest = manifest["format"] > 1 or "digest" in manifest
    if has_digest and (found := _digest_of(manifest)) != manifest.get("digest"):
        raise CheckpointError(
            "The checkpoint's manifest is damaged.",
            where=path,
            found=f"digest {found}",
            expected=f"digest {manifest.get('digest')}",
            do=again,
        )
    if has_digest and not _is_as_written(text, manifest):
        raise CheckpointError(
            "The checkpoint's manifest is damaged.",
            where=path,
            found="the content that was written, in other characters",
            expected="not a character changed",
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
        check_owner(folder / name, link=False)
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


class TurnedBack(CheckpointError):
    """The run has turned back to before this checkpoint, which is whole."""


def newest_good(
    checkpoints: Path, turned_back: Callable[[Checkpoint], str | None] = lambda checkpoint: None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones.

    Args:
        checkpoints: The run's folder of checkpoints.
        turned_back: Says of a whole one why the run does not go on from it; None where it may.
    """
    problems: list[CheckpointError] = []
    for folder in steps(checkpoints):
        try:
            found = read(folder)
        except CheckpointError as error:
            problems.append(error)
            continue
        if (why := turned_back(found)) is None:
            return found, problems
        problems.append(
            TurnedBack("The run has turned back to before a checkpoint.", where=folder, found=why)
        )
    return None, problems


def set_aside(folder: Path, why: str = "damaged") -> Path | None:
    """Rename a checkpoint, so that it is not looked at again and the run can save its step anew.

    Args:
        folder: The checkpoint's.
        why: `damaged`, or `turned-back` for one that is whole.

    Returns:
        Its new name, `step-XXXXXXXX.WHY-TIME`; None where it cannot be renamed.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    renamed = folder.with_name(f"{folder.name}.{why}-{stamp}")
    try:
        if renamed.exists():
            renamed = renamed.with_name(f"{renamed.name}-{uuid.uuid4().hex[:4]}")
        os.rename(folder, renamed)
    except OSError:
        return None
    return renamed


def remove(folder: Path) -> bool:
    """Remove a checkpoint; whether it is gone. One that cannot be removed is no reason to stop a run."""
    # Renamed first, so that a crash in mid-removal leaves no folder that looks like a checkpoint.
    doomed = folder.with_name(f".{folder.name}.tmp-pruned-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(folder, doomed)
    except OSError:
        return False
    discard(doomed)
    return True


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(folder.name.removeprefix("step-"))


def check_owner(path: Path, *, link: bool = True) -> None:
    """Refuse what somebody else could have put there.

    Who may write into a folder that is not open to everybody was chosen by its owner. Where everybody may write, as
    in `/tmp`, only what this user or root owns is taken.

    Args:
        path: A checkpoint's folder, or a file in it.
        link: Whether it may be a symbolic link.

    Raises:
        CheckpointError: It is another user's, or a link.
    """
    try:
        found, around = path.lstat(), path.parent.stat()
    except OSError:
        return  # the reader says what is missing
    if not link and stat.S_ISLNK(found.st_mode):
        raise CheckpointError(
            "A file of the checkpoint is a link.",
            where=path,
            found=os.readlink(path),
            expected="a file in the checkpoint's folder",
            do="copy the checkpoint whole",
        )
    if around.st_mode & stat.S_IWOTH and found.st_uid not in (0, os.geteuid()):
        raise CheckpointError(
            "The checkpoint is another user's, in a folder that everybody may write to.",
            where=path,
            found=f"owner {found.st_uid}",
            expected=f"owner {os.geteuid()}",
            do=f"if you trust it: chmod o-w {path.parent}",
        )
