"""The folder of a checkpoint that is imported or made: written beside its place, by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_checkpoint(out: Path) -> Iterator[Path]:
    """A folder beside `out`, with an empty `state`, for what becomes a checkpoint; it goes where the block fails.

    What others are writing beside it is left alone; what a killed command of the same name has left is not.

    Args:
        out: The checkpoint's folder, which is not there yet.

    Raises:
        ConfigError: It is there already, or another process is writing it.
        EnvironmentProblem: The disk is full or failing.
    """
    from megatron_davinci.convert.resumable import only_writer
    from megatron_davinci.files import disk_errors, make_private_folder

    with disk_errors(out, "writing a checkpoint"):
        make_private_folder(out.parent)
    with only_writer(out, "writing a checkpoint"):
        temporary = out.with_name(f".{out.name}.partial")
        try:
            with disk_errors(out, "writing a checkpoint"):
                shutil.rmtree(temporary, ignore_errors=True)
                os.mkdir(temporary, 0o700)
                os.mkdir(temporary / "state", 0o700)
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
