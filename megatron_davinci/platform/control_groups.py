"""The control groups that a process is in: what a container, or a job of a cluster, may use of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The groups that this process is in, and all that those are in, which have limits of their own.

    Args:
        root: Where `proc` and `sys` are.
        controller: `memory` or `cpu`.

    Yields:
        A group's folder, which need not be there, and the version of control groups that it is of, 1 or 2.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # In a container that is not told its place, the path is the host's, and only its own group is there.
        inner = PurePosixPath(path.lstrip("/"))
        if controllers == "":
            for above in (inner, *inner.parents):
                yield mounts / above, 2
                yield mounts / "unified" / above, 2
        elif controller in controllers.split(","):
            # Controllers that are mounted together have a folder of all their names, and often links beside it.
            for name in dict.fromkeys((controller, controllers)):
                for above in (inner, *inner.parents):
                    yield mounts / name / above, 1
