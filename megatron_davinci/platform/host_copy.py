"""A copy of tensors in the host's memory, in buffers that are kept for the next copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_davinci.platform.available_memory import available_bytes

_LEFT_FREE = 0.1
"""Of the memory that is available, what a copy leaves alone."""


class HostCopy:
    """Copies tensors to buffers of the host, pinned where they come from a GPU.

    The first copy of a state allocates; later ones of the same sizes only copy, since memory that was never touched
    costs several times the copy itself.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Copy tensors, and wait until all are there.

        Args:
            tensors: Of any device.

        Returns:
            The copies, dense and of the originals' sizes. They are overwritten by the next call. None where the
            host has no room for them.
        """
        kept = [_fits(buffer, tensor) for buffer, tensor in zip(self._buffers, tensors, strict=False)]
        kept += [False] * (len(tensors) - len(kept))
        new = sum(t.numel() * t.element_size() for t, fits in zip(tensors, kept, strict=True) if not fits)
        if not all(kept):
            self._buffers = [
                buffer if fits else buffer.new_empty(0)
                for buffer, fits in zip(self._buffers, kept, strict=False)
            ][: len(tensors)]
            if new > available_bytes() * (1 - _LEFT_FREE):
                self._buffers = []
                return None
        buffers = []
        for number, (tensor, fits) in enumerate(zip(tensors, kept, strict=True)):
            buffer = self._buffers[number] if fits else _empty_like(tensor)
            buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            buffers.append(buffer)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        self._buffers = buffers
        return list(buffers)


def _fits(buffer: Tensor, tensor: Tensor) -> bool:
    if buffer.dtype != tensor.dtype or buffer.shape != tensor.shape or buffer.is_pinned() != tensor.is_cuda:
        return False
    return buffer.stride() == torch.empty_like(tensor, device="meta").stride()


def _empty_like(tensor: Tensor) -> Tensor:
    # Dense, whatever the original is a part of: no more than it is written.
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
