"""The last steps of the process that becomes the program: limits, rights, rules, and execution."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress

from megatron_davinci.platform.jail import filter as calls
from megatron_davinci.platform.jail import landlock, system
from megatron_davinci.platform.jail.root import DEVICES
from megatron_davinci.platform.jail.spec import LANDLOCK, NAMESPACES, SECCOMP, Spec

# Of /proc, what a program may ask of itself and of the machine where it has no /proc of its own.
_OF_PROC = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory")
NOBODY = 65534
_BEHIND = 5  # niceness: what must be watched, since no kernel limits it, must not be ahead of who watches
_MAPPED_FROM = 1 << 30  # user numbers that no account has


def free_user() -> int | None:
    """A user number that nobody else has, for a program of root's; None where this process cannot become one.

    It is another one each time, so that limits on a user's processes are a program's own.
    """
    if os.geteuid() != 0 or not system.permitted() & (1 << 7) or not system.permitted() & (1 << 6):
        return None
    with open("/proc/self/uid_map") as file:
        ranges = [(int(first), int(count)) for first, _, count in (line.split() for line in file)]
    wanted = _MAPPED_FROM + int.from_bytes(os.urandom(3), "big")
    for user in (wanted, NOBODY):
        if any(first <= user < first + count for first, count in ranges):
            return user
    return None


def limit(spec: Spec, before: int) -> None:
    """Set what setrlimit(2) limits.

    Args:
        spec: The limits.
        before: Processes and threads that its user has already, which count too.
    """
    cpu = max(1, int(spec.cpu + 0.999))
    for kind, value in (
        (resource.RLIMIT_AS, spec.memory),
        (resource.RLIMIT_CPU, cpu + 1),
        (resource.RLIMIT_FSIZE, spec.file_size),
        (resource.RLIMIT_NOFILE, spec.open_files),
        (resource.RLIMIT_NPROC, spec.processes + before),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_RTPRIO, 0),
    ):
        _, hard = resource.getrlimit(kind)
        top = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # SIGXCPU says what ended a program; at the hard limit it would be SIGKILL, which says nothing.
        soft = min(cpu, top) if kind == resource.RLIMIT_CPU else top
        resource.setrlimit(kind, (soft, top))


def reachable(paths: list[str]) -> bool:
    """Whether a user without rights can read these: every folder above each lets anybody through."""
    for path in map(os.path.realpath, paths):
        while path != "/":
            if not os.stat(path).st_mode & 0o001 and os.path.isdir(path):
                return False
            path = os.path.dirname(path)
    return True


def become_program(
    spec: Spec,
    *,
    home: str,
    user: int | None,
    before: int,
    readable: list[str],
    stdio: tuple[int, int, int],
) -> None:
    """Become the program. Does not return.

    Raises:
        OSError: A step failed; the process must end without having run anything.
    """
    os.setsid()
    for number, descriptor in enumerate(stdio):
        os.dup2(descriptor, number)
    os.umask(0o022)
    os.chdir(home)
    alone = spec.way == NAMESPACES
    limit(spec, before)
    keep = None
    if not alone:
        os.nice(_BEHIND)
    if user is not None:
        if not alone and not reachable([spec.argv[0], *spec.readable]):
            # Its own files lie where others may not go. Landlock says what may be read, so this gives away nothing.
            keep = next(
                (one for one in (system.DAC_READ_SEARCH, system.DAC_OVERRIDE)
                 if spec.way == LANDLOCK and system.permitted() & (1 << one)), None,
            )  # fmt: skip
            if keep is None:
                raise PermissionError(
                    f"{spec.argv[0]}, or what it reads, is closed to users without rights, and root cannot be limited"
                )
        system.become(user)
    elif os.geteuid() == 0 and not alone:
        raise PermissionError("root without the right to become another user cannot be limited")
    system.end_with_parent(signal.SIGKILL)  # a change of user takes it back, so it comes after
    system.keep_only(keep)
    system.gain_nothing()
    has = landlock.version() if spec.way != SECCOMP else 0
    if has or spec.way == LANDLOCK:  # in namespaces it is one wall more, here the only one
        landlock.restrict(["/"] if alone else [*readable, *_OF_PROC], [home], list(DEVICES), spec.network)
    system.install_filter(
        calls.program(
            system.MACHINE,
            families=calls.families(unix=alone, network=spec.network),
            alone=alone,
            signals=alone or has >= landlock.SIGNALS,
            writes=spec.way != SECCOMP,
            truncates=alone or has >= landlock.TRUNCATES,
            own_pid=os.getpid(),
        )
    )
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    environment: Mapping[str, str] = {**spec.environment, "HOME": home, "TMPDIR": home}
    os.execve(spec.argv[0], spec.argv, environment)
