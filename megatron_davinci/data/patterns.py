"""Files that a pattern names, links to folders followed, and each folder entered once on a way."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator


def matching(pattern: str) -> list[str]:
    """Files by a pattern as `glob` reads it, where `**` stands for any folders: their paths, sorted.

    A link may lead back to a folder that it lies in. `glob` goes round there until the system refuses, which names a
    file forty times over, and with two such links it does not end.
    """
    return sorted({path for path in _named(pattern) if os.path.isfile(path)})


def _named(pattern: str) -> Iterator[str]:
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    # What is before it has been named: the empty text stands for the folder that the process is in.
    before = os.sep.join(parts[:at]) or (os.sep if at else "")
    behind = os.sep.join(parts[at + 1 :]) or "*"
    for top in glob.iglob(before) if before else [before]:
        for folder in _folders(top, frozenset()):
            yield from _named(os.path.join(glob.escape(folder), behind))


def _folders(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """A folder and those in it, but for hidden ones, and for those that it lies in itself."""
    try:
        status = os.stat(folder or os.curdir)
        with os.scandir(folder or os.curdir) as entries:
            inside = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return  # no folder, or one that may not be looked into
    this = status.st_dev, status.st_ino
    if this in above:
        return
    yield folder
    for name in inside:
        yield from _folders(os.path.join(folder, name), above | {this})
