"""A stand-in for the name `torch` inside Megatron-Core's modules, for machines without CUDA.

Megatron-Core 0.16 asks `torch.cuda` for its device and writes `device="cuda"` in a few factories. On a CPU the
import hook binds this stand-in to the global name `torch` of `megatron.core` modules, and of nothing else:
torch itself and the user's code stay as they are. It differs from torch in `.cuda` and in the `device` (and
`pin_memory`) arguments of the factories that Megatron-Core calls.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")


class _Event:
    """An event on a device whose work is always complete."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _Stream:
    """CPU work is synchronous: all streams are one, and it is always idle."""

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


_STREAM = _Stream()

_CUDA: dict[str, Callable[..., Any]] = {
    "current_device": lambda: CPU,
    "current_stream": lambda *_, **__: _STREAM,
    "default_stream": lambda *_, **__: _STREAM,
    "Stream": lambda *_, **__: _STREAM,
    "stream": lambda _: contextlib.nullcontext(),
    "Event": _Event,
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "set_device": lambda *_: None,
    "device_count": lambda: 1,
    "manual_seed": torch.manual_seed,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}

_FACTORIES = (
    "tensor zeros ones empty full arange rand randn as_tensor empty_like zeros_like ones_like full_like"
).split()


class _CudaStandIn:
    def __getattr__(self, name: str) -> Any:
        return _CUDA[name] if name in _CUDA else getattr(torch.cuda, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or torch.device(device).type == "cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


class _TorchStandIn(types.ModuleType):
    cuda = _CudaStandIn()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


STAND_IN = _TorchStandIn("torch")
"""Bound to the name `torch` inside `megatron.core.*` on a CPU."""
for _name in _FACTORIES:
    setattr(STAND_IN, _name, _on_cpu(getattr(torch, _name)))
