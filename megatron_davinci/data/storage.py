"""Bytes of stored files, read by range: one face for local files and objects in S3.

Ranges are read with `pread` and not through a mapping. A random window costs the disk its own bytes, where a fault
in a mapping costs the kernel's read-around; and a file that shrinks under a run is a short read, which is an error
that names the file, where a mapping would end the process by a signal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Protocol

from megatron_davinci.data.places import NotThere, Place, S3Path
from megatron_davinci.errors import DataError, EnvironmentProblem

_CHUNK = 8 << 20
_ONLY_CACHED = getattr(
    os, "RWF_NOWAIT", 0
)  # Linux; elsewhere a read may wait, which is slower and no less right


class Blob(Protocol):
    """One stored file, open.

    Attributes:
        place: Where it lies.
        size: Bytes, as of its opening.
        fd: Descriptor of a local file; -1 if it is none.
    """

    place: Place
    size: int
    fd: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on, wholly. Threads may call this at once.

        Args:
            offset: In bytes.
            buffer: Writable and contiguous, of single bytes.

        Raises:
            DataError: The file ends before the range does, or is not the one that was opened.
            EnvironmentProblem: It cannot be read. What the buffer holds then has no meaning.
        """

    def will_need(self, offset: int, nbytes: int) -> None:
        """Say that a range is read soon; returns at once."""

    def close(self) -> None:
        """Let go of it; whoever reads at this moment still ends well."""


class LocalBlob:
    """A local file, read by `pread`.

    Args:
        path: Of the file.

    Raises:
        DataError: There is no such file.
        EnvironmentProblem: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.place: Place = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _absent(path) from error
        except OSError as error:
            raise EnvironmentProblem(
                "A file cannot be opened.",
                where=path,
                found=error.strerror,
                do="check the file's permissions, its folders' and the mount",
            ) from error
        self.size = os.fstat(self.fd).st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `Blob.read_into`."""
        try:
            count = os.preadv(self.fd, (buffer,), offset)
            while count < len(buffer):
                # A signal may cut a read short; the file's end does so for good.
                more = os.preadv(self.fd, (buffer[count:],), offset + count)
                if more == 0:
                    raise DataError(
                        "A file is shorter than it was when it was opened.",
                        where=f"{self.place}, bytes {offset:,} to {offset + len(buffer):,}",
                        found=f"an end at byte {min(offset + count, os.fstat(self.fd).st_size):,}",
                        expected=f"{self.size:,} bytes",
                        do="restore the file; no run may read it while it is being written",
                    )
                count += more
        except OSError as error:
            raise EnvironmentProblem(
                "A file cannot be read.",
                where=f"{self.place}, bytes {offset:,} to {offset + len(buffer):,}",
                found=error.strerror,
                do="check the disk and the mount, then resume",
            ) from error

    def will_need(self, offset: int, nbytes: int) -> None:
        """As `Blob.will_need`: the kernel begins to read into its page cache."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Nothing at once: a thread may be reading. The descriptor goes with the last reference."""

    def __del__(self) -> None:
        fd = self.__dict__.pop("fd", None)
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


def read_cached(fds: Sequence[int], offsets: Sequence[int], buffers: Sequence[memoryview]) -> list[int]:
    """Fill those of many buffers whose bytes are in the kernel's page cache, by one read each, and wait for no disk.

    Args:
        fds: Descriptor of the file of each; -1 for one that has none.
        offsets: Of each, in bytes.
        buffers: Each writable and contiguous, of single bytes.

    Returns:
        Positions of the buffers that are not filled. What they hold has no meaning; `Blob.read_into` fills them, or
        says why it cannot.
    """
    # By `map`, because the loop around a read of a few KB would cost a good part of what the read does.
    reads = map(os.preadv, fds, zip(buffers), offsets, repeat(_ONLY_CACHED))
    counts: list[int] = []
    while True:
        try:
            counts.extend(reads)
            break
        except OSError:
            counts.append(-1)  # not cached; or the file system cannot tell (NFS among others)
    sizes = list(map(len, buffers))
    return [] if counts == sizes else [i for i, size in enumerate(sizes) if counts[i] != size]


def open_blob(place: Place) -> Blob:
    """Open a stored file.

    Raises:
        DataError: There is none.
        EnvironmentProblem: It cannot be opened.
    """
    if isinstance(place, S3Path):
        from megatron_davinci.data.s3 import S3Blob  # boto3 is an extra

        return S3Blob(place)
    return LocalBlob(place)


def open_if_there(place: Place) -> Blob | None:
    """Open a stored file; None if there is none.

    Raises:
        EnvironmentProblem: It cannot be opened.
    """
    try:
        return open_blob(place)
    except NotThere:
        return None


def size_of(place: Place) -> int | None:
    """The size of a stored file in bytes; None if there is none.

    Raises:
        EnvironmentProblem: It cannot be found out.
    """
    if isinstance(place, S3Path):
        from megatron_davinci.data.s3 import object_size

        return object_size(place)
    try:
        return place.stat().st_size if place.is_file() else None
    except OSError as error:
        raise EnvironmentProblem("A file cannot be looked at.", where=place, found=error.strerror) from error


def read_all(place: Place) -> bytes:
    """The whole content of a small stored file.

    Raises:
        DataError: There is none.
        EnvironmentProblem: It cannot be read.
    """
    blob = open_blob(place)
    content = bytearray(blob.size)
    blob.read_into(0, memoryview(content))
    blob.close()
    return bytes(content)


def read_range(place: Place, offset: int, nbytes: int) -> bytes:
    """Some bytes of a stored file.

    Raises:
        DataError: There is no such file, or it ends earlier.
        EnvironmentProblem: It cannot be read.
    """
    blob = open_blob(place)
    content = bytearray(nbytes)
    blob.read_into(offset, memoryview(content))
    blob.close()
    return bytes(content)


def digest_of(place: Place) -> str:
    """Hex SHA-256 of a stored file's bytes, read in pieces.

    Raises:
        DataError: There is no such file.
        EnvironmentProblem: It cannot be read.
    """
    if isinstance(place, S3Path):
        # What is read once, whole, would drive everything else out of the cache.
        place = replace(place, options=replace(place.options, cache_bytes=0))
    blob, digest = open_blob(place), hashlib.sha256()
    piece = bytearray(_CHUNK)
    for first in range(0, blob.size, _CHUNK):
        part = memoryview(piece)[: min(_CHUNK, blob.size - first)]
        blob.read_into(first, part)
        digest.update(part)
    blob.close()
    return digest.hexdigest()


def _absent(place: Place) -> NotThere:
    return NotThere("A data file is not there.", where=place, found="no such file")
