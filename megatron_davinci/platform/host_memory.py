"""Between host memory and the device: pinned where that helps, and without waiting for the copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_davinci.platform.device import Platform


class HostToDevice:
    """Carries arrays to the device, in their own dtype: what is wider is made of them there.

    Args:
        platform: Whose device.
    """

    def __init__(self, platform: Platform) -> None:
        self._device = platform.device
        self._is_cuda = platform.name == "cuda"
        self._copied: torch.cuda.Event | None = None

    def pin(self, memory: np.ndarray) -> Callable[[], None] | None:
        """Have the device copy from this memory directly, if it can; without, copies take a detour.

        Args:
            memory: [bytes] uint8.

        Returns:
            What undoes it, before the memory goes; None if nothing was done.
        """
        if not self._is_cuda:
            return None
        address = memory.ctypes.data
        return (lambda: unpin_host_memory(address)) if pin_host_memory(address, memory.nbytes) else None

    def copy(self, array: np.ndarray) -> Tensor:
        """The array on the device; on the CPU, the array's own memory. It may be written to again after `wait`."""
        tensor = torch.from_numpy(array).to(self._device, non_blocking=True)
        if self._is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return tensor

    def wait(self) -> None:
        """Wait until what was copied has left host memory."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


class DeviceToHost:
    """Carries tensors to host memory while the device goes on computing; on the CPU, at once.

    Args:
        platform: Whose device.
    """

    def __init__(self, platform: Platform) -> None:
        self._is_cuda = platform.name == "cuda"
        self._stream = torch.cuda.Stream(platform.device) if self._is_cuda else None
        self._copied: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """What is copied in this block is copied beside what the device does, after what it was given before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def hold(self) -> None:
        """Have the device wait for the copy before it does anything further; nobody else waits."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copy is there."""
        if self._copied is not None:
            self._copied.synchronize()


def pin_host_memory(address: int, nbytes: int) -> bool:
    """Lock memory of this process in place and make it known to CUDA.

    Args:
        address: Of its first byte, at the beginning of a page.
        nbytes: Its size.

    Returns:
        Whether CUDA agreed. It does not where the limit of locked memory is too low.
    """
    try:
        pinned = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0
    except (RuntimeError, AssertionError):  # no CUDA, or a torch without it
        return False
    if not pinned:
        # The refusal stays the runtime's last error, which the next kernel's launch would be blamed for.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
    return pinned


def unpin_host_memory(address: int) -> None:
    """Undo `pin_host_memory`, before the memory goes."""
    torch.cuda.cudart().cudaHostUnregister(address)
