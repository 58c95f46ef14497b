"""How many bytes of tensors are alive while a step is computed, by watching every operation of torch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations return and that are still referenced.

    What a kernel takes and gives back inside one operation is not seen. A storage is counted once, however many
    tensors look at it, and again when it is resized, which is how Megatron-Core discards a norm's output.

    Attributes:
        now: Bytes that are alive.
        peak: The most that there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def count(self, *tensors: torch.Tensor | None) -> int:
        """Count tensors that were there before; returns the bytes that they add."""
        before = self.now
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor.untyped_storage())
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)))
        return out

    def __enter__(self) -> LiveBytes:
        original, counter = self._resize, self

        def resize_(storage: Any, size: int) -> Any:
            done = original(storage, size)
            if storage._cdata in counter._sizes:
                counter._see(storage)
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class _Enough(Exception):
    """Forward and backward passes are over."""


def measure(settings: dict[str, Any], platform: Any) -> dict[str, int]:
    """What this rank holds in the second step of a run, until gradients are summed over ranks.

    gloo copies what it reduces, which NCCL does not; so it is left out. The first step has no optimizer state yet.

    Args:
        settings: Of a run configuration; the process groups of its layout are up.
        platform: What to compute on.

    Returns:
        Bytes of `weights`, `gradients` and `optimizer`, and `total` at the fullest moment.
    """
    from megatron.core import parallel_state

    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer
    from megatron_davinci.train.step import Stepper, wrap_model

    config = validate(settings, "benchmarks/memory.py")
    chunks = build_model(config, platform)
    wrapped = wrap_model(chunks, config)
    optimizer = build_optimizer(config, wrapped)
    stepper = Stepper(wrapped, optimizer, config, platform)
    rows = config.curriculum[0].global_batch_size[-1].size // parallel_state.get_data_parallel_world_size()
    tokens = torch.randint(config.model.vocab_size, (rows, config.data.sequence_length + 1))
    micro_batches = rows // config.train.micro_batch_size
    stepper.train(tokens, micro_batches)
    gc.collect()

    counter, buffers = LiveBytes(), [buffer for chunk in wrapped for buffer in chunk.buffers]
    measured = {
        "weights": counter.count(
            *(p.data for chunk in chunks for p in chunk.parameters()), *(b.param_data for b in buffers)
        ),
        "gradients": counter.count(*(buffer.grad_data for buffer in buffers)),
        "optimizer": counter.count(*_optimizer_state(optimizer)),
    }

    def stop(*_: Any, **__: Any) -> None:
        measured["total"] = counter.peak
        raise _Enough

    chunks[0].config.finalize_model_grads_func = stop
    try:
        with counter:
            stepper.train(tokens, micro_batches)
    except _Enough:
        pass
    return measured


def _optimizer_state(optimizer: Any) -> list[torch.Tensor]:
    tensors = []
    for one in optimizer.chained_optimizers:
        tensors += [p.data for group in one.optimizer.param_groups for p in group["params"]]
        tensors += [v for state in one.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return tensors


def measure_all(whole: list[dict[str, Any]]) -> list[dict[str, int]]:
    """`measure` each of several settings of one layout, on the ranks of the environment."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose("cpu", threads=1)
    distributed.start(platform, **validate(whole[0], "benchmarks/memory.py").parallel.groups)
    measured = [measure(settings, platform) for settings in whole]
    distributed.stop()
    return measured
