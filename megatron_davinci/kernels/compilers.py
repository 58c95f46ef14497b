"""nvcc and g++: the library ahead of time, the emulator, and what ptxas says of each kernel.

Nothing but the standard library is imported, since `setup.py` calls this too.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import sources

TARGETS = (80, 90, 100)
"""Compute capabilities, times 10, that the library has machine code for. Newer ones take the last one's PTX."""

_PTXAS = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel for one target.

    Attributes:
        kernel: Its symbol.
        target: Compute capability, times 10.
        registers: A thread.
        spills: Bytes that a thread writes to or reads from local memory because registers were too few.
        stack: Bytes of its stack frame.
    """

    kernel: str
    target: int
    registers: int
    spills: int
    stack: int


def find_nvcc() -> Path | None:
    """nvcc: on the path, in CUDA_HOME, where CUDA's installer puts it, or from a package; None where none is."""
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places.append(Path("/usr/local/cuda"))
    places += (path for entry in sys.path if entry for path in sorted(Path(entry).glob("nvidia/cu*")))
    return next((nvcc for place in places if (nvcc := place / "bin" / "nvcc").is_file()), None)


def find_host_compiler() -> str | None:
    """The C++ compiler that Python's extensions are built with, or g++; None where there is none."""
    named = (sysconfig.get_config_var("CXX") or "g++").split()[0]
    return next((path for name in (named, "g++", "c++") if (path := shutil.which(name))), None)


def require_host_compiler() -> str:
    """`find_host_compiler`, or an error.

    Raises:
        EnvironmentProblem: There is none.
    """
    compiler = find_host_compiler()
    if compiler is None:
        raise EnvironmentProblem(
            "The kernels' emulator is asked for, and there is no C++ compiler to make it.",
            where="DAVINCI_KERNELS=emulator",
            do="install g++ 9 or newer, or unset the variable",
        )
    return compiler


def build_library(out: Path, nvcc: Path, where: Path | None = None) -> None:
    """Make the library with machine code for `TARGETS`, and the last one's PTX.

    Args:
        out: The library's path; it is there whole or not at all.
        nvcc: The compiler.
        where: The sources' folder; default: the package's.

    Raises:
        EnvironmentProblem: nvcc fails.
    """
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS[:-1]]
    last = TARGETS[-1]
    codes.append(f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]")
    flags = ["-std=c++17", "-O3", "--shared", "--threads", "0", "-cudart", "static"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    _make(out, [str(nvcc), *flags, *codes], where)


def ptxas(target: int, nvcc: Path, where: Path | None = None) -> list[Compiled]:
    """Compile all kernels for one target and say what ptxas said.

    Raises:
        EnvironmentProblem: nvcc fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
        flags.append(f"-gencode=arch=compute_{target},code=sm_{target}")
        said = _make(Path(scratch) / "kernels.cubin", [str(nvcc), *flags], where)
    found: list[Compiled] = []
    kernel, stack, spills = "", 0, 0
    for line in said.splitlines():
        if match := _PTXAS.search(line):
            kernel = match[1]
        elif match := _SPILLS.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := _REGISTERS.search(line):
            found.append(Compiled(kernel, target, int(match[1]), spills, stack))
    return found


def can_fuse() -> bool:
    """Whether this CPU multiplies and adds with one rounding."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # 64-bit ARM always does
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def emulator(kind: str = "plain", *, where: Path | None = None, out: Path | None = None) -> Path:
    """The emulator's library; it is made once for the same sources.

    Args:
        kind: `plain`; `sanitized`: with AddressSanitizer, and who loads it must have its runtime preloaded
            (`sanitizer_runtime`); `fused`: products and sums are fused where a compiler for GPUs may fuse them, which
            the CPU must be able to (`can_fuse`).
        where: The sources' folder; default: the package's.
        out: The library's path; default: in the user's cache.

    Raises:
        EnvironmentProblem: There is no C++ compiler, or it fails; or there is no place to write to.
    """
    compiler, fuse = require_host_compiler(), kind == "fused"
    if out is None:
        out = cache() / f"emulator-{sources.digest(where)}-{kind}.so"
        if out.exists():
            return out
    # Products and sums stay apart, as they are written, so that what a test sees does not depend on the host's
    # compiler; unless it is asked what becomes of numbers where they do not, as on a GPU.
    flags = [
        "-x",
        "c++",
        "-std=c++17",
        "-O2" if fuse else "-O1",  # g++ fuses from -O2 on
        "-fPIC",
        "-shared",
        f"-ffp-contract={'fast' if fuse else 'off'}",
        "-Wno-unknown-pragmas",
    ]
    flags += ["-fvisibility=hidden", "-DDAVINCI_EMULATOR"]
    if fuse and platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mfma")
    if kind == "sanitized":
        flags += ["-g", "-fsanitize=address", "-fsanitize-recover=address", "-fno-omit-frame-pointer"]
    _make(out, [compiler, *flags], where)
    return out


def sanitizer_runtime() -> str | None:
    """What LD_PRELOAD must be for a library with AddressSanitizer; None where the compiler has none.

    The C++ library comes with it: Python has none in it, and what throws could not be watched.
    """
    compiler = find_host_compiler()
    if compiler is None:
        return None
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    return " ".join(found) if all(map(os.path.isabs, found)) else None


def cache() -> Path:
    """The folder in which emulators are kept; it is there then.

    Raises:
        EnvironmentProblem: It cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "megatron-davinci" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(folder, error) from error
    return folder


def _no_place(folder: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "What a compiler makes of the kernels cannot be written.",
        where=folder,
        found=error.strerror,
        do="make it a folder that can be written to; emulators are kept under XDG_CACHE_HOME, which may be another",
    )


def _make(out: Path, command: list[str], where: Path | None) -> str:
    """Compile all sources into `out`; returns what the compiler said."""
    whole = (where or sources.folder()) / sources.WHOLE
    return compile_into(out, [*command, f'-DDAVINCI_DIGEST="{sources.digest(where)}"'], whole)


def compile_into(out: Path, command: list[str], source: Path) -> str:
    """Compile a file into `out`, beside it first; returns what the compiler said.

    Raises:
        EnvironmentProblem: The compiler fails, or the folder cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}-", suffix=out.suffix)
    except OSError as error:
        raise _no_place(out.parent, error) from error
    os.close(handle)
    beside = Path(name)
    try:
        command = [*command, str(source), "-o", str(beside)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            telling = [line for line in lines if "error" in line][:8] or lines[-8:]
            raise EnvironmentProblem(
                "The kernels do not compile.",
                where=source,
                found="\n".join([f"{command[0]} ends with {done.returncode}", *telling]),
                do="use CUDA 12.8 or newer and g++ 9 or newer; DAVINCI_KERNELS=reference runs without",
            )
        beside.chmod(0o755)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return done.stdout + done.stderr
