"""Write a file whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megatron_davinci.errors import EnvironmentProblem


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path`: written beside it, flushed to the disk, renamed into place.

    A reader sees the old file or the new one, never a part. The folder is made if it is not there.

    Raises:
        EnvironmentProblem: The disk refused; what was at `path` before is untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentProblem(
            "A report could not be written.",
            where=path,
            found=error,
            expected="a folder that can be written to, with space on its disk",
            do="Free some space or mend the folder's permissions, then write the report again.",
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself; some network file systems do not let a folder be opened for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
