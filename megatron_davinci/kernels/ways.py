"""By which way ops run on a device: decided here and nowhere else, once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import compilers, nvrtc, ptx_emulator
from megatron_davinci.kernels.library import KernelError, Library
from megatron_davinci.kernels.table import KERNELS, OPS, Kernel
from megatron_davinci.platform import cuda_launch

SWITCH = "DAVINCI_KERNELS"
"""An environment variable: one of `NAMES`, which must then be possible. Default: the best that is."""

EMULATOR = "DAVINCI_EMULATOR"
"""An environment variable: what the emulator runs, one of `EMULATED`. Default: the first."""

EMULATED = ("plain", "sanitized", "fused", "ptx", *(f"ptx_{target}" for target in compilers.TARGETS))
"""The kernels' source; the same with AddressSanitizer, whose runtime must be preloaded; with products and sums
fused, as compilers for GPUs do; and what nvcc makes of it in PTX, for compute capability 9.0 or the one named."""

NAMES = ("ahead_of_time", "run_time", "emulator", "reference")
PACKAGED = Path(__file__).with_name("_cuda.so")
"""What `setup.py` makes where there is nvcc."""

SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "int64"}
_ASKED = "asked for"
_MOST_BLOCKS = 2**31 - 1
_EMULATED_BLOCKS = 3  # so that blocks take several rows each, as on a GPU with more rows than blocks

_log = logging.getLogger(__name__)


class Way:
    """A way to run ops on one device.

    Attributes:
        name: One of `NAMES`.
        why: A few words for whoever asks.
    """

    name = "reference"
    most_blocks = _MOST_BLOCKS

    def __init__(self, why: str) -> None:
        self.why = why

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"

    @property
    def has_kernels(self) -> bool:
        """Whether it launches kernels: plain torch is the way that does not."""
        return self.name != "reference"

    def launch(self, name: str, blocks: int, of: Tensor, *arguments: Tensor | int | float) -> None:
        """Start a kernel on the current stream of the tensors' device.

        Args:
            name: Of the kernel, without the dtype's suffix.
            blocks: How many; as many as there is independent work, fewer are started where that is better.
            of: The tensor whose dtype and device it is for.
            arguments: What it takes; tensors are contiguous and on one device.

        Raises:
            KernelError: It could not be started.
        """
        raise NotImplementedError("plain torch has no kernels")


class Loaded(Way):
    """Kernels of a library: on a GPU, or emulated.

    Args:
        name: One of `NAMES`, "emulator" for a library that computes on a CPU.
        why: As of every way.
        library: Of the kernels that are asked for, at least.
    """

    def __init__(self, name: str, why: str, library: Library) -> None:
        super().__init__(why)
        self.name = name
        self._library = library
        if name == "emulator":
            self.most_blocks = _EMULATED_BLOCKS

    def launch(self, name: str, blocks: int, of: Tensor, *arguments: Tensor | int | float) -> None:
        """As `Way.launch`."""
        kernel, suffix = KERNELS[name], SUFFIXES[of.dtype]
        blocks, given = _limited(blocks, kernel, of.device, self.most_blocks), _addresses(arguments)
        if of.device.type != "cuda":
            self._library.launch(kernel, suffix, blocks, given, 0)
            return
        with cuda_launch.on(of.device):
            self._library.launch(kernel, suffix, blocks, given, cuda_launch.current_stream(of.device))


class Ptx(Way):
    """What nvcc makes of kernels, emulated; a source is compiled when one of its kernels is first used."""

    name = "emulator"
    most_blocks = _EMULATED_BLOCKS

    def __init__(self, why: str, build: Callable[[str], ptx_emulator.Built] = ptx_emulator.build) -> None:
        super().__init__(why)
        self._build = build
        self._libraries: dict[str, Library] = {}

    def launch(self, name: str, blocks: int, of: Tensor, *arguments: Tensor | int | float) -> None:
        """As `Way.launch`."""
        kernel = KERNELS[name]
        library = self._libraries.get(kernel.source)
        if library is None:
            built = self._build(kernel.source)
            library = self._libraries[kernel.source] = _emulated(built.path, built.digest, built.kernels)
        blocks = _limited(blocks, kernel, of.device, self.most_blocks)
        library.launch(kernel, SUFFIXES[of.dtype], blocks, _addresses(arguments), 0)


class _RunTime(Way):
    """Kernels that NVRTC compiles when they are first used."""

    name = "run_time"

    def __init__(self, why: str, compiler: nvrtc.Compiler, capability: int) -> None:
        super().__init__(why)
        self._compiler, self._capability = compiler, capability
        self._modules: dict[str, nvrtc.Module] = {}

    def launch(self, name: str, blocks: int, of: Tensor, *arguments: Tensor | int | float) -> None:
        kernel, suffix = KERNELS[name], SUFFIXES[of.dtype]
        with cuda_launch.on(of.device):
            module = self._modules.get(kernel.source)
            if module is None:
                module = nvrtc.Module(self._compiler.compile(kernel.source, self._capability))
                self._modules[kernel.source] = module
            stream = cuda_launch.current_stream(of.device)
            blocks = _limited(blocks, kernel, of.device, self.most_blocks)
            module.launch(kernel, suffix, blocks, _addresses(arguments), stream)


def _limited(blocks: int, kernel: Kernel, device: torch.device, most: int) -> int:
    resident = kernel.resident or (1 if kernel.slots else 0)
    if resident and device.type == "cuda":
        most = min(most, resident * cuda_launch.multiprocessors(device))
    return max(1, min(blocks, most))


def _addresses(arguments: Sequence[Tensor | int | float]) -> list[int | float]:
    return [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]


_asked: str | Way | None = None  # by `using`


@contextmanager
def emulating(what: str) -> Iterator[None]:
    """Have ops emulated in a `with`.

    Args:
        what: One of `EMULATED`.
    """
    before = os.environ.get(EMULATOR)
    os.environ[EMULATOR] = what
    _way.cache_clear()
    try:
        with using("emulator"):
            yield
    finally:
        os.environ.pop(EMULATOR)
        if before is not None:
            os.environ[EMULATOR] = before
        _way.cache_clear()


@contextmanager
def using(way: str | Way) -> Iterator[None]:
    """Have ops run by a way in a `with`, as the environment variable does for a process.

    Args:
        way: One of `NAMES`, or a way of one's own, such as other kernels of the same names: on every device.

    Raises:
        EnvironmentProblem: It is no way's name.
    """
    global _asked
    before, _asked = _asked, way if isinstance(way, Way) else _checked(way)
    try:
        yield
    finally:
        _asked = before


def way_for(device: torch.device) -> Way:
    """The way on a device.

    Raises:
        EnvironmentProblem: One was asked for by name and cannot be taken.
    """
    asked = _asked if _asked is not None else _checked(os.environ.get(SWITCH, "auto"))
    if isinstance(asked, Way):
        return asked
    return _way(device.type, device.index or 0, asked)


def require_kernels(device: torch.device, setting: str) -> None:
    """Refuse a device on which ops would run in plain torch though that is not the device's way.

    Args:
        device: What is computed on.
        setting: What asks for kernels by name.

    Raises:
        EnvironmentProblem: It is a GPU, and its kernels cannot be run.
    """
    way = way_for(device)
    if device.type == "cuda" and not way.has_kernels and way.why != _ASKED:
        raise EnvironmentProblem(
            "Kernels are asked for by name, and cannot run on this device.",
            where=setting,
            found=way.why,
            do=f"see `davinci doctor --kernels`; {SWITCH}=reference computes the same in plain torch",
        )


def way_of(op: str, *tensors: Tensor) -> Way:
    """The way of an op on these tensors: plain torch where its kernels do not take them, which is said once.

    Args:
        op: A name of `OPS`.
        tensors: Its arguments, the one whose dtype says which kernel first.

    Raises:
        ValueError: They are on several devices.
    """
    first = tensors[0]
    if any(tensor.device != first.device for tensor in tensors):
        raise ValueError(f"{op}: tensors are on {', '.join(sorted({str(one.device) for one in tensors}))}")
    way = way_for(first.device)
    if not way.has_kernels:
        return way
    suffix = SUFFIXES.get(first.dtype)
    if suffix not in OPS[op][0].suffixes:
        return _declined(op, f"there is no kernel for {first.dtype}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        return _declined(op, "a tensor is not contiguous")
    return way


@cache
def _declined(op: str, why: str) -> Way:
    _log.warning("%s runs in plain torch: %s", op, why)
    return Way(why)


def _checked(name: str) -> str:
    if name not in ("auto", *NAMES):
        raise EnvironmentProblem(
            "There is no such way to run kernels.",
            where=SWITCH,
            found=name,
            expected=f"auto, {', '.join(NAMES)}",
            do="take one of these, or unset the variable",
        )
    return name


@cache
def _way(kind: str, index: int, asked: str) -> Way:
    if asked == "reference":
        return Way(_ASKED)
    device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    if kind == "cpu" and asked in ("auto", "emulator"):
        if asked == "auto":
            return Way("the platform is cpu")
        return _emulator(os.environ.get(EMULATOR, EMULATED[0]))
    refused: list[str] = []
    if kind != "cuda":
        refused.append(f"the device is a {kind}")
    if not refused and asked in ("auto", "ahead_of_time"):
        found = _ahead_of_time(device)
        if isinstance(found, Way):
            return found
        refused.append(found)
    if kind == "cuda" and asked in ("auto", "run_time"):
        found = _run_time(device)
        if isinstance(found, Way):
            return found
        refused.append(found)
    if kind == "cuda" and asked == "emulator":
        refused.append("the emulator computes on a cpu")
    why = "; ".join(refused)
    if asked != "auto":
        raise EnvironmentProblem(
            f"Kernels are asked for {asked.replace('_', ' ')}, which cannot be.",
            where=SWITCH,
            found=why,
            do="see `davinci doctor --kernels`, or unset the variable",
        )
    return Way(why)


def _emulator(what: str) -> Way:
    if what not in EMULATED:
        raise EnvironmentProblem(
            "There is no such emulator.",
            where=EMULATOR,
            found=what,
            expected=", ".join(EMULATED),
            do="take one of these, or unset the variable",
        )
    if what.startswith("ptx"):
        target = int(what[4:] or ptx_emulator.TARGET)
        build = partial(ptx_emulator.build, target=target)
        return Ptx(f"asked for, PTX for compute capability {target / 10}", build)
    path = compilers.emulator(what)
    return Loaded("emulator", f"asked for, {path}", _emulated(path))


def _emulated(path: Path, *more: Any) -> Library:
    """What was made here, or by another machine that has the same cache."""
    try:
        return Library(path, *more)
    except OSError as error:
        raise EnvironmentProblem(
            "The kernels' emulator cannot be loaded.",
            where=path,
            found=str(error),
            do="delete it, and it is made again; or unset the variable DAVINCI_KERNELS",
        ) from error


def _ahead_of_time(device: torch.device) -> Way | str:
    """The way, or why it cannot be taken."""
    if not PACKAGED.exists():
        return "no library was made ahead of time: nvcc was not there at installation"
    capability = cuda_launch.capability(device)
    if capability < compilers.TARGETS[0]:
        return f"the library has nothing for compute capability {capability / 10}"
    try:
        return Loaded("ahead_of_time", str(PACKAGED), Library(PACKAGED))
    except OSError as error:
        return str(error)


def _run_time(device: torch.device) -> Way | str:
    """The way, or why it cannot be taken."""
    compiler = nvrtc.find_compiler()
    if compiler is None:
        return "NVRTC was not found: CUDA builds of torch bring it along"
    capability = cuda_launch.capability(device)
    try:
        if capability < compiler.targets()[0]:
            return f"NVRTC {compiler.version()} makes no code for compute capability {capability / 10}"
        return _RunTime(f"NVRTC {compiler.version()}", compiler, capability)
    except KernelError as error:
        return str(error)
