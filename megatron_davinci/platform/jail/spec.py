"""What the sandbox tells the jail, and what the jail says: JSON over pipes."""

from __future__ import annotations

from dataclasses import dataclass, field

# How a program is kept in, the strongest first.
NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "landlock", "seccomp"
WAYS = (NAMESPACES, LANDLOCK, SECCOMP)


@dataclass(frozen=True)
class Spec:
    """A program and its bounds. Sizes are bytes, times seconds.

    Attributes:
        argv: The program and its arguments.
        environment: All variables that it sees, beside HOME and TMPDIR.
        stdin: What it can read.
        files: Texts by name, in its own folder when it starts.
        readable: What it may read.
        way: One of `WAYS`.
        network: Whether it may use the network.
        scratch: A folder that is there for it, empty.
        wall, cpu, memory, processes, open_files, file_size, disk, files_count, output: Limits.
    """

    argv: list[str]
    environment: dict[str, str]
    stdin: str
    files: dict[str, str]
    readable: list[str]
    way: str
    network: bool
    scratch: str
    wall: float
    cpu: float
    memory: int
    processes: int
    open_files: int
    file_size: int
    disk: int
    files_count: int
    output: int


@dataclass
class Said:
    """What came of it.

    Attributes:
        setup: Why the program was not started; None where it was.
        ended: What ended it, where the jail did: `timeout`, `memory`, `processes`, `output`, `disk`.
        code: Its exit code, negative for a signal.
        out, err: What it printed, as latin-1 so that JSON carries any byte.
        wall, cpu: Seconds.
        peak: Bytes, the more of two: what its processes had to themselves at once, as sampled, and what the largest
            had resident.
        most: The most processes at once, as sampled.
        user: Whom it ran as.
        facts: What kept it in.
    """

    setup: str | None = None
    ended: str | None = None
    code: int = 0
    out: str = ""
    err: str = ""
    wall: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    most: int = 0
    user: int = -1
    facts: dict[str, str] = field(default_factory=dict)
