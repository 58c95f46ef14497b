"""What a kernel's launch asks of torch: a device's capability, its current stream, and that it is the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, times 10: 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has: 132 for an H100."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that torch launches on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a CUDA device is the current one, with its context."""
    return torch.cuda.device(device)


def devices() -> list[torch.device]:
    """The CUDA devices of this machine; none where torch was built without, or finds none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def name_of(device: torch.device) -> str:
    """What the vendor calls a CUDA device."""
    return str(torch.cuda.get_device_name(device))
