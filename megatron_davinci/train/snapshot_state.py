"""A rank's state as one run of bytes, from which the same ranks go on exactly as they were.

Kept are the optimizer's tensors, the shard of this rank where it is sharded: what it updates (fp32 main weights under
bf16, the weights themselves under fp32) and both moments. The model's weights follow from them. Buffers that training
changes are kept too. In front of them is a text that says what else there is to know: the position of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_davinci.errors import CheckpointError
from megatron_davinci.optim.dealt import DealtMuon

_TEXT_BYTES = 64 << 10
_ALIGN = 64
_MOMENTS, _RANGES = ("exp_avg", "exp_avg_sq"), "exp_range"  # the last where moments have 8 bits


class RankState:
    """The tensors that a rank's snapshots hold, at fixed places.

    Args:
        wrapped: The model chunks, wrapped for data parallelism.
        optimizer: Megatron-Core's optimizer. Moments that it does not have yet are made, with zeros.
    """

    def __init__(self, wrapped: Sequence[Any], optimizer: Any) -> None:
        self._wrapped = list(wrapped)
        self._optimizers = [
            one
            for one in getattr(optimizer, "chained_optimizers", [optimizer])
            if not getattr(one, "is_stub_optimizer", False)
        ]
        self._tensors: list[Tensor] = []
        self._places: list[slice] = []
        end = _TEXT_BYTES
        buffers = list(self._buffers())
        self._buffer_count = len(buffers)
        for tensor in (*buffers, *self._optimized()):
            self._tensors.append(tensor)
            self._places.append(slice(end, end + tensor.nbytes))
            end += -(-tensor.nbytes // _ALIGN) * _ALIGN
        self.nbytes = end

    def _optimized(self) -> Iterator[Tensor]:
        for one in self._optimizers:
            one.init_state_fn(one.optimizer, one.config)
            for group in one.optimizer.param_groups:
                for parameter in group["params"]:
                    state = one.optimizer.state[parameter]
                    if set(state) not in ({_MOMENTS[0]}, set(_MOMENTS), {*_MOMENTS, _RANGES}):
                        raise RuntimeError(f"an optimizer with {sorted(state)} for its state")
                    yield from (parameter.detach(), *(state[name] for name in sorted(state)))

    def _buffers(self) -> Iterator[Tensor]:
        for chunk in self._wrapped:
            for module in chunk.module.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set:
                        yield buffer

    @torch.no_grad()
    def write(self, region: np.ndarray, description: dict[str, Any]) -> None:
        """Copy the state to host memory.

        From a GPU to pinned memory the optimizer's part is only queued on the current stream; it must not be updated
        before that is through. Buffers, which a forward pass may change, are there when this returns.

        Args:
            region: [nbytes or more] uint8; what is beyond stays as it is.
            description: The position of the run, as a checkpoint has it.

        Raises:
            ValueError: The description is too long.
        """
        said = {"run": description, "optimizer_steps": self._steps(), "bytes": self.nbytes}
        text = json.dumps(said).encode()
        if len(text) >= _TEXT_BYTES:
            raise ValueError(f"a description of {len(text)} bytes")
        region[:_TEXT_BYTES] = 0
        region[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        for number, (tensor, place) in enumerate(zip(self._tensors, self._places, strict=True)):
            queued = number >= self._buffer_count
            _as_tensor(region[place], tensor).copy_(tensor, non_blocking=queued)

    @torch.no_grad()
    def read(self, region: np.ndarray) -> None:
        """Fill model and optimizer from what `write` wrote; every rank calls this.

        Raises:
            CheckpointError: It is of other tensors.
        """
        text = _text(region)
        stored = text.get("bytes", self.nbytes)  # earlier versions did not say
        if (len(text["optimizer_steps"]), stored) != (
            len(self._steps()),
            self.nbytes,
        ) or region.nbytes < stored:
            raise CheckpointError(
                "A snapshot in memory is of another optimizer.",
                found=f"{min(stored, region.nbytes):,} bytes",
                expected=f"{self.nbytes:,} bytes",
                do="free it: end the process snapshot_keeper.py of this run",
            )
        for tensor, place in zip(self._tensors, self._places, strict=True):
            tensor.copy_(_as_tensor(region[place], tensor))
        steps = iter(text["optimizer_steps"])
        for one in self._optimizers:
            for group in one.optimizer.param_groups:
                if (step := next(steps)) is not None:
                    group["step"] = step
            if hasattr(one, "_copy_main_params_to_model_params"):
                one._copy_main_params_to_model_params()
            if isinstance(one.optimizer, DealtMuon):
                one.optimizer.share()
        for chunk in self._wrapped:
            if chunk.ddp_config.use_distributed_optimizer:
                chunk.start_param_sync(force_sync=True)

    def _steps(self) -> list[int | None]:
        groups = (group for one in self._optimizers for group in one.optimizer.param_groups)
        return [int(group["step"]) if "step" in group else None for group in groups]


def described(region: np.ndarray) -> dict[str, Any]:
    """The description that was written to a region."""
    return dict(_text(region)["run"])


def _text(region: np.ndarray) -> dict[str, Any]:
    return dict(json.loads(region[:_TEXT_BYTES].tobytes().rstrip(b"\0")))


def _as_tensor(region: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(region).view(like.dtype).view(like.shape)
