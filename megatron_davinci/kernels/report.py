"""Which way each op runs on each device of this machine, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import compilers, nvrtc, sources, ways
from megatron_davinci.kernels.library import Library
from megatron_davinci.kernels.table import OPS
from megatron_davinci.platform import cuda_launch


@dataclass(frozen=True)
class OpWay:
    """An op on a device.

    Attributes:
        op: Its name.
        device: Of this machine: `cpu`, `cuda:0`.
        dtypes: Those that its kernels take.
        way: A name of `ways.NAMES`; empty where the one that was asked for cannot be taken.
        why: A few words.
    """

    op: str
    device: str
    dtypes: tuple[str, ...]
    way: str
    why: str


@dataclass(frozen=True)
class Report:
    """What the doctor says of kernels.

    Attributes:
        ops: By device, then by op.
        tools: What makes kernels here, and what was found of it.
    """

    ops: list[OpWay]
    tools: dict[str, str]

    @property
    def refused(self) -> bool:
        """Whether a way that was asked for cannot be taken."""
        return any(not op.way for op in self.ops)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def kernel_report() -> Report:
    """Look at this machine; nothing is compiled but an emulator that was asked for."""
    found = []
    for device in (torch.device("cpu"), *cuda_launch.devices()):
        try:
            way = ways.way_for(device)
            name, why = way.name, way.why
        except EnvironmentProblem as error:
            name, why = "", f"{error.what} {error.found or ''}".strip()
        found += [OpWay(op, str(device), kernels[0].suffixes, name, why) for op, kernels in OPS.items()]
    return Report(found, _tools())


def _tools() -> dict[str, str]:
    nvcc, host, compiler = compilers.find_nvcc(), compilers.find_host_compiler(), nvrtc.find_compiler()
    names = [f"{device}: {cuda_launch.name_of(device)}" for device in cuda_launch.devices()]
    if not ways.PACKAGED.exists():
        made = "none: nvcc was not there at installation"
    else:
        try:
            made = str(Library(ways.PACKAGED).path)
        except OSError as error:
            made = f"not used: {error}"
    return {
        "GPUs": ", ".join(names) or "none",
        "sources": f"{sources.folder()} ({sources.digest()})",
        "library ahead of time": made,
        "NVRTC": "not found" if compiler is None else f"{compiler.version()}, {compiler.path}",
        "nvcc": str(nvcc or "not found"),
        "C++ compiler": host or "not found",
    }
