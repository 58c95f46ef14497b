"""The files that a writer adds to a checkpoint: new ones, hashed as they are written, synced, and read back."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.files import file_digest

_AT_ONCE = 1 << 20


class DigestFile(io.FileIO):
    """A new file that hashes the bytes as they are handed to `write`, and is on the disk when it is closed.

    The digest is of what was meant to be written: damage between here and the disk shows when it is verified. A file
    or link that is there already is an error, never written to or followed.
    """

    def __init__(self, name: str, mode: str = "wb") -> None:
        super().__init__(name, mode, opener=_open_new)
        self._digest = hashlib.sha256()
        self._small = bytearray()
        self.bytes = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, as a buffered file would.

        What the file system refused is kept in `failure`: torch's archive writer forgets it and raises its own.
        """
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        if len(self._small) + len(view) >= _AT_ONCE:
            self.flush()
        if len(view) >= _AT_ONCE:
            self._write_through(view)
        else:
            # torch writes some ten pieces of a few bytes a tensor.
            self._small += view
        return len(view)

    def tell(self) -> int:
        """Bytes that were written."""
        return self.bytes

    def flush(self) -> None:
        """Hand what was gathered to the file system."""
        if self._small and self.failure is None:
            gathered, self._small = self._small, bytearray()
            self._write_through(memoryview(gathered))

    def _write_through(self, view: memoryview) -> None:
        self._digest.update(view)
        try:
            self._write_all(view)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def _write_all(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += super().write(view[written:]) or 0

    def close(self) -> None:
        """Close; what was written is on the disk then."""
        if self.closed:
            return
        try:
            self.flush()
            if self.failure is None:
                os.fsync(self.fileno())
        except OSError as error:
            self.failure = error
            raise
        finally:
            super().close()

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of the file."""
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


def _open_new(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW, 0o666)


class NewFiles:
    """The files that one writer adds to a checkpoint, and what the manifest will say of them.

    Args:
        folder: The checkpoint's folder from `begin`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, DigestFile] = {}
        self._verified: set[str] = set()

    def open(self, name: str | os.PathLike[str], mode: str = "wb") -> DigestFile:
        """A new file to write to."""
        file = DigestFile(str(name), mode)
        self._opened[self._inside(name)] = file
        return file

    def write(self, name: str | os.PathLike[str], content: bytes) -> None:
        """Write a whole file."""
        with self.open(name) as file:
            file.write(content)

    def renamed(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        """Note that a file has another name now."""
        self._opened[self._inside(new)] = self._opened.pop(self._inside(old))

    @property
    def failure(self) -> OSError | None:
        """What the file system refused first, if it refused something."""
        return next((file.failure for file in self._opened.values() if file.failure), None)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the manifest will say, by path in the checkpoint."""
        return {name: file.entry for name, file in self._opened.items()}

    def read_back(self) -> None:
        """Read what was written from the disk, as far as the system lets go of its copy in memory.

        Raises:
            EnvironmentProblem: The disk holds something else.
        """
        for name, entry in self.entries.items():
            if name in self._verified:
                continue
            path = self._folder / name
            found = file_digest(path, from_disk=True)
            if found != entry["sha256"]:
                raise EnvironmentProblem(
                    "The disk does not hold what was written to it.",
                    where=path,
                    found=f"sha256 {found}",
                    expected=f"sha256 {entry['sha256']}",
                    do="check the disk and the machine's memory",
                )
            self._verified.add(name)

    def _inside(self, name: str | os.PathLike[str]) -> str:
        return Path(name).relative_to(self._folder).as_posix()
