"""The emulator of what nvcc makes: a source compiled to PTX, that to C++ (`ptx_as_cpp`), and that by g++."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import compilers, ptx_as_cpp, sources
from megatron_davinci.kernels.table import KERNELS, Kernel

TARGET = 90
SHARED_KIB = {80: 163, 86: 99, 89: 99, 120: 99}
"""Of a block at most, by compute capability times 10; 227 where it is not listed."""


@dataclass(frozen=True)
class Built:
    """A library of one source's kernels.

    Attributes:
        path: Its.
        digest: Of the sources.
        kernels: What it has.
        translated: What it was made of.
    """

    path: Path
    digest: str
    kernels: tuple[Kernel, ...]
    translated: ptx_as_cpp.Translated


def build(
    source: str,
    *,
    target: int = TARGET,
    trace: bool = False,
    where: Path | None = None,
    kernels: Sequence[Kernel] = tuple(KERNELS.values()),
) -> Built:
    """Make a source's library, or take it where it was made.

    Args:
        source: A name of `Kernel.source`.
        target: Compute capability, times 10.
        trace: It notes what is run and which memory is touched (`kernel_traffic` of the benchmarks).
        where: The sources' folder; default: the package's. What is made of others is kept there.
        kernels: Those that there are; of them the source's are in the library.

    Raises:
        EnvironmentProblem: There is no nvcc or no C++ compiler, one of them fails, or nvcc made something that is not
            known here.
    """
    nvcc = compilers.find_nvcc()
    if nvcc is None:
        raise EnvironmentProblem(
            "What nvcc makes is to be emulated, and there is no nvcc.",
            where="DAVINCI_EMULATOR=ptx",
            do="install CUDA's compiler (the package nvidia-cuda-nvcc is enough), or unset the variable",
        )
    compiler = compilers.require_host_compiler()
    folder = where or sources.folder()
    kept = where or compilers.cache()
    digest = sources.digest(where)
    code = f"{digest}-{_version(nvcc)}-sm_{target}-{Path(source).stem}"
    assembly = kept / f"{code}.ptx"
    if not assembly.exists():
        flags = ["-std=c++17", "-O3", "-lineinfo", "-ptx", f"-arch=compute_{target}"]
        compilers.compile_into(assembly, [str(nvcc), *flags], folder / source)
    its = tuple(kernel for kernel in kernels if kernel.source == source)
    translated = ptx_as_cpp.translate(assembly.read_text(), its, (folder / "ptx.h").read_text())
    made_by = hashlib.sha256(translated.text.encode()).hexdigest()[:8]
    path = kept / f"{code}-{made_by}{'-traced' if trace else ''}.so"
    if not path.exists():
        flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden"]
        flags += ["-DDAVINCI_EMULATOR", f'-DDAVINCI_DIGEST="{digest}"', f"-I{folder}"]
        flags += [f"-DDAVINCI_SHARED_KIB={SHARED_KIB.get(target, 227)}"]
        with tempfile.TemporaryDirectory() as scratch:  # others may make the same at the same time
            text = Path(scratch) / f"{Path(source).stem}.cpp"
            text.write_text(translated.text)
            compilers.compile_into(path, [compiler, *flags, *(["-DDAVINCI_TRACE"] if trace else [])], text)
    return Built(path, digest, its, translated)


@lru_cache(maxsize=4)
def _version(nvcc: Path) -> str:
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256(said.encode()).hexdigest()[:8]
