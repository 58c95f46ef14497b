"""CPU or CUDA: chosen once, here. No other room asks."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform.cores import usable_cores
from megatron_davinci.platform.import_hook import FINDER


@dataclass(frozen=True)
class Platform:
    """What the run computes on.

    Attributes:
        name: `cpu` or `cuda`.
        backend: The collective library: `gloo` or `nccl`.
        device: This rank's device.
        native_bf16: Whether the hardware multiplies bf16 faster than fp32.
    """

    name: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    device: torch.device
    native_bf16: bool

    def precision(self, asked: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
        """Resolve `train.precision`."""
        if asked == "auto":
            return "bf16" if self.native_bf16 else "fp32"
        return asked

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.name == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        """One line for the log."""
        if self.name == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, nccl"
        return (
            f"CPU, gloo, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a rank"
        )


def choose(device: Literal["auto", "cpu", "cuda"] = "auto", threads: int | None = None) -> Platform:
    """Choose the platform, before Megatron-Core is imported.

    Args:
        device: `auto` takes CUDA where it is.
        threads: CPU threads of this rank; default: the machine's cores divided by the local ranks.

    Raises:
        EnvironmentProblem: CUDA was asked for by name and is not there, or Megatron-Core was already imported
            for the other platform.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise EnvironmentProblem(
            "CUDA was asked for and torch finds none.",
            where="parallel.device",
            found=f"torch {torch.__version__}, torch.cuda.is_available() is False",
            do="install a CUDA build of torch (docs/install-gpu.md), or set parallel.device=auto",
        )
    use_cpu = device == "cpu" or not available
    if FINDER.on_cpu is not None and FINDER.on_cpu != use_cpu:
        raise EnvironmentProblem(
            "Megatron-Core was already imported for another platform in this process.",
            where="parallel.device",
            found="cpu" if FINDER.on_cpu else "cuda",
            expected="cpu" if use_cpu else "cuda",
            do="choose the platform before importing megatron.core",
        )
    FINDER.device = "cpu" if use_cpu else "cuda"
    if use_cpu:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, usable_cores() // local_ranks))
        return Platform("cpu", "gloo", torch.device("cpu"), native_bf16=_cpu_multiplies_bf16())
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            "This node has fewer GPUs than local ranks.",
            where=f"local rank {index} on {socket.gethostname()}",
            found=f"{torch.cuda.device_count()} GPUs",
            do="start as many ranks a node as it has GPUs (torchrun --nproc-per-node)",
        )
    # Megatron-Core's overlap of communication and computation rests on kernels starting in the order of their launch.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(index)
    device_ = torch.device("cuda", index)
    return Platform(
        "cuda",
        "nccl",
        device_,
        torch.cuda.is_bf16_supported(including_emulation=False),
    )


def count_gpus() -> int:
    """GPUs of this machine; 0 on a CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu_multiplies_bf16() -> bool:
    """Whether oneDNN has bf16 instructions here (AVX512-BF16 or AMX). Emulated, bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
