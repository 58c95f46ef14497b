"""Writing files so that a crash leaves the old one whole, and hashing what is written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_davinci.errors import EnvironmentProblem

_AT_ONCE = 1 << 16  # bytes that are read of a file from its end

_CHUNK = 8 * 1024 * 1024


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn a full or failing disk into an error that says so.

    Args:
        path: What is being written.
        doing: The action, for the message: `writing a checkpoint`.

    Raises:
        EnvironmentProblem: An `OSError` came out of the block.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise EnvironmentProblem(
            f"The disk is full: {doing} failed." if full else f"A file system error: {doing} failed.",
            where=path,
            found=f"{error.strerror or error}" + (_free(path) if full else ""),
            do="free space or choose another folder, then start the same command again"
            if full
            else "check the folder's permissions and the disk",
        ) from error


def _free(path: Path) -> str:
    try:
        return f", {free_bytes(path):,} bytes free"
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Bytes that the file system of `path` (or of its nearest existing parent) has left."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable, where the file system lets a folder be opened and synced.

    Some network file systems and folders that a virtual machine shares do not; what is written there is still whole.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # fsync(2): it does not support synchronisation
            raise
    finally:
        os.close(descriptor)


def make_private_folder(folder: Path) -> bool:
    """Make a folder that is closed to users outside the group; whether it was not there before.

    One that is there keeps its permissions: they were somebody's choice.
    """
    if folder.is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(folder, 0o770)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> None:
    """Give two folders each other's names, in one step where the system can, so that `other` is always there."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        renameat2 = None
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(other))
    between = one.with_name(f"{one.name}-exchanged")
    os.rename(other, between)
    os.rename(one, other)
    os.rename(between, one)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` in one rename, after its new content is on disk.

    Raises:
        EnvironmentProblem: The file could not be written; the old one is whole.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with disk_errors(path, f"writing {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically. Half a surrogate pair, as file names may have it, is escaped."""
    write_atomically(path, in_utf8(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def in_utf8(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair, as names of files may have it, is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Whole lines of a file, however long, the last one first; one that is being written is none yet.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        begin, cut, ended = file.seek(0, 2), b"", False
        while begin:
            size = min(_AT_ONCE, begin)
            begin -= size
            file.seek(begin)
            cut, *lines = (file.read(size) + cut).split(b"\n")
            if lines and not ended:
                lines.pop()  # what lies behind the last line's end
                ended = True
            yield from reversed(lines)
        if ended:
            yield cut


def file_digest(path: Path, *, from_disk: bool = False) -> str:
    """SHA-256 of a file's bytes, in hex.

    Args:
        path: The file.
        from_disk: Ask the system to forget its copy in memory first. Only of what is on the disk it does.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
