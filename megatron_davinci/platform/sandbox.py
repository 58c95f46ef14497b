"""Programs that nobody has read, run so that they can do no harm: code that a model wrote, or that tests it.

A program gets limits on time, memory, processes, files and output, no network, no variables of ours, no other
processes to see or signal, and a folder of its own as the only place to write. When it ends, or has to, everything
that it started ends with it.

What keeps it in is what Linux lets this process have, the strongest first: namespaces with a root of its own, then
Landlock with seccomp, then seccomp alone, under which no file can be written. None of them needs rights. Started by
root, a program runs as a user that nobody else is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.platform.jail import system
from megatron_davinci.platform.jail.spec import WAYS, Said, Spec

MIB = 1 << 20
_GRACE = 30.0  # seconds for the jail itself
_START = "import sys; sys.path.insert(0, {root!r}); from megatron_davinci.platform.jail.supervise import main; main()"
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # so that a program does the same again
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONUTF8": "1",
    # A thread is a process to the kernel, and takes address space.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
# What a program's last line on standard error says of a limit that it ran into.
_LAST_WORDS = (
    (re.compile(r"^\S*MemoryError\b"), "memory"),
    (re.compile(r"\[Errno (27|28)\]"), "disk"),  # EFBIG, ENOSPC
    (re.compile(r"\[Errno 11\]|can't start new thread"), "processes"),  # EAGAIN
)

Status = Literal["ok", "failed", "timeout", "memory", "processes", "output", "disk", "forbidden", "killed"]


class NoSandbox(EnvironmentProblem):
    """This machine has nothing that keeps a program in, or not the way that was asked for."""


@dataclass(frozen=True)
class Limits:
    """What a program may use, all that it starts included.

    Attributes:
        wall_seconds: From its start to its end. Long, so that a busy machine does not decide what a program is worth.
        cpu_seconds: Of processor time.
        memory_bytes: Address space of a process, and memory of all together.
        processes: At once. A thread counts as one.
        open_files: At once, of a process.
        file_bytes: Of one file.
        disk_bytes: Of all files. Where there are namespaces they lie in memory, beside `memory_bytes`.
        files: How many files and folders.
        output_bytes: Of standard output and error together. More ends it.
    """

    wall_seconds: float = 60.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1024 * MIB
    processes: int = 32
    open_files: int = 64
    file_bytes: int = 16 * MIB
    disk_bytes: int = 64 * MIB
    files: int = 1024
    output_bytes: int = MIB

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(
                    "A limit of the sandbox is no limit.",
                    where=f"limits.{name}",
                    found=value,
                    expected="more than 0",
                )


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    Attributes:
        status: `ok` (exit code 0); `failed` (another); `timeout`, `memory`, `processes`, `output`, `disk` (it reached
            that limit); `forbidden` (it made a system call that no program here needs); `killed` (by another signal).
        code: Its exit code, negative for a signal.
        stdout, stderr: What it printed, up to the limit; what is no UTF-8 is replaced.
        wall_seconds, cpu_seconds: What it took.
        peak_bytes: The most memory, as sampled.
        most_processes: The most at once, as sampled.
        user: The number of the user that it ran as, seen from outside.
        isolation: What kept it in: `way`, `files`, `processes`, `network`, `calls`.
    """

    status: Status
    code: int
    stdout: str
    stderr: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    most_processes: int
    user: int
    isolation: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether it ended by itself and said that all was well."""
        return self.status == "ok"


def run_program(
    argv: Sequence[str],
    *,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    readable: Sequence[str | Path] = (),
    environment: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    network: Literal["denied", "allowed"] = "denied",
    way: str | None = None,
) -> Ran:
    """Run a program that nobody trusts.

    Args:
        argv: The program, by its absolute path, and its arguments.
        stdin: What it can read from standard input.
        files: Texts by relative name, which lie in its own folder, where it starts.
        readable: Folders and files that it may read, beside the system's programs and libraries.
        environment: Variables that it sees, beside a few that are always the same. None is taken from this process.
        limits: What it may use.
        network: Without a way to deny it, nothing is run unless it is allowed.
        way: `namespaces`, `landlock` or `seccomp`; None for the strongest that this machine has.

    Raises:
        ConfigError: A file's name leaves the folder, or the way is none.
        NoSandbox: Nothing here keeps a program in.
        EnvironmentProblem: The program could not be started, or the jail itself failed.
    """
    for name in files or {}:
        if os.path.isabs(name) or ".." in Path(name).parts or not name:
            raise ConfigError(
                "A file for the sandbox leaves its folder.", found=name, expected="a relative name"
            )
    if way is not None and way not in WAYS:
        raise ConfigError("There is no such way to keep a program in.", found=way, expected=", ".join(WAYS))
    if way is None:
        way = strongest_way(network)
    said = _run(list(argv), stdin, files or {}, readable, environment or {}, limits or Limits(), network, way)
    if said.setup is not None:
        raise NoSandbox(
            "The program was not started, since the sandbox could not be made or could not start it.",
            where=f"{argv[0]}, kept in by {way}",
            found=said.setup,
            do="davinci doctor --sandbox says what this machine has",
        )
    return Ran(
        status=_status(said),
        code=said.code,
        stdout=_text(said.out),
        stderr=_text(said.err),
        wall_seconds=said.wall,
        cpu_seconds=said.cpu,
        peak_bytes=said.peak,
        most_processes=said.most,
        user=said.user,
        isolation={"way": way, **said.facts},
    )


def run_python(text: str, *, packages: bool = True, **options: Any) -> Ran:
    """Run the text of a Python program, as `program.py` in its own folder.

    Args:
        text: The program.
        packages: Whether it may import what is installed beside this package (numpy, sympy).
        options: As of `run_program`.

    Raises:
        ConfigError, NoSandbox, EnvironmentProblem: As `run_program`.
    """
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    readable: list[str | Path] = [sys.base_prefix, python, *options.pop("readable", ())]
    environment: dict[str, str] = dict(options.pop("environment", None) or {})
    if packages:
        places = list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
        readable += places
        environment["PYTHONPATH"] = os.pathsep.join(places)
    files = {**(options.pop("files", None) or {}), "program.py": text}
    return run_program(
        [python, "program.py"], files=files, readable=readable, environment=environment, **options
    )


def available_ways(network: Literal["denied", "allowed"] = "denied") -> dict[str, str | None]:
    """Each way to keep a program in, tried with a program: why it cannot be had here, None where it can."""
    with _lock:
        return {way: _try(way, network) for way in WAYS}


def strongest_way(network: Literal["denied", "allowed"] = "denied") -> str:
    """The first of the ways that can be had here.

    Raises:
        NoSandbox: None can.
    """
    with _lock:
        reasons = []
        for way in WAYS:
            reason = _try(way, network)
            if reason is None:
                return way
            reasons.append(f"{way}: {reason}")
    raise NoSandbox(
        "Nothing on this machine keeps an untrusted program in, so none is run.",
        found="\n".join(reasons),
        expected="user namespaces, or Landlock and seccomp, or seccomp (Linux on x86_64 or aarch64)",
        do="allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone, "
        "user.max_user_namespaces), or start the container with a profile that lets seccomp and Landlock through",
    )


_lock = threading.Lock()
_tried: dict[tuple[str, str], str | None] = {}


def _try(way: str, network: Literal["denied", "allowed"]) -> str | None:
    if (way, network) not in _tried:
        if sys.platform != "linux" or not system.known():
            _tried[way, network] = f"{sys.platform} on {system.MACHINE}"
        else:
            python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
            argv = [python, "-I", "-S", "-c", "print(6 * 7)"]
            readable = [sys.base_prefix, python]
            said = _run(argv, "", {}, readable, {}, Limits(wall_seconds=30), network, way)
            if said.setup is None and _text(said.out) != "42\n":
                said.setup = (
                    f"a program that should have said 42 ended with {said.code}: {_text(said.err)[-300:]}"
                )
            _tried[way, network] = said.setup
    return _tried[way, network]


def _run(
    argv: list[str],
    stdin: str,
    files: Mapping[str, str],
    readable: Sequence[str | Path],
    environment: Mapping[str, str],
    limits: Limits,
    network: str,
    way: str,
) -> Said:
    scratch = tempfile.mkdtemp(prefix="davinci-sandbox-")
    try:
        spec = Spec(
            argv=argv,
            environment={**_ENVIRONMENT, **environment},
            stdin=stdin,
            files=dict(files),
            readable=[str(path) for path in readable],
            way=way,
            network=network == "allowed",
            scratch=scratch,
            wall=limits.wall_seconds,
            cpu=limits.cpu_seconds,
            memory=limits.memory_bytes,
            processes=limits.processes,
            open_files=limits.open_files,
            file_size=limits.file_bytes,
            disk=limits.disk_bytes,
            files_count=limits.files,
            output=limits.output_bytes,
        )
        return _in_jail(spec)
    finally:
        _remove(Path(scratch))


def _in_jail(spec: Spec) -> Said:
    root = str(Path(__file__).parents[2])
    jail = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _START.format(root=root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"LANG": "C.UTF-8", "PYTHONUTF8": "1"},
        start_new_session=True,
    )
    try:
        out, err = jail.communicate(json.dumps(asdict(spec)).encode(), timeout=spec.wall + _GRACE)
        return Said(**json.loads(out))
    except (ValueError, TypeError) as error:
        raise EnvironmentProblem(
            "The process that keeps programs in has failed.",
            where="megatron_davinci.platform.jail",
            found=err.decode(errors="replace")[-1000:] or f"exit code {jail.returncode}",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(
            "The process that keeps programs in has not come back.",
            found=f"nothing for {_GRACE:.0f} s after the program's time was over",
        ) from error
    finally:
        if jail.poll() is None:  # an interrupt, or no answer: it ends what it has started
            jail.terminate()
            try:
                jail.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                jail.kill()
                jail.communicate()


def _status(said: Said) -> Status:
    if said.ended is not None:
        return said.ended  # type: ignore[return-value]
    if said.code == 0:
        return "ok"
    if said.code == -signal.SIGXCPU:
        return "timeout"
    if said.code == -signal.SIGXFSZ:
        return "disk"
    if said.code == -signal.SIGSYS:
        return "forbidden"
    if said.code < 0:
        return "killed"
    last = said.err.rstrip().rsplit("\n", 1)[-1]
    for pattern, status in _LAST_WORDS:
        if pattern.search(last):
            return status  # type: ignore[return-value]
    return "failed"


def _text(latin: str) -> str:
    return latin.encode("latin-1").decode("utf-8", "replace")


def _remove(folder: Path) -> None:
    """Take away what a program has left, of any depth and with any permissions. Links are not followed."""
    number = 0
    waiting = [folder]
    while waiting:
        inner = waiting.pop()
        try:
            os.chmod(inner, 0o700)
            entries = list(os.scandir(inner))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                # Brought up to the top: a path may be deeper than the kernel takes.
                number += 1
                moved = folder / f".davinci-{number}-{os.urandom(4).hex()}"
                try:
                    os.chmod(entry.path, 0o700)
                    os.rename(entry.path, moved)
                except OSError:
                    moved = Path(entry.path)
                waiting.append(moved)
            else:
                os.unlink(entry.path)
        if inner != folder:
            os.rmdir(inner)
    os.rmdir(folder)
