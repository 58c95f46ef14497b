"""The distributed optimizer's state on the first data-parallel rank, in memory that is kept for the next time.

Megatron-Core gathers it into new tensors at every save: it clears them, fills them, gathers, joins and copies, and
most of the time goes into memory that was never touched. The values here are the same; where they lie is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KEYS = ("param", "exp_avg", "exp_avg_sq")


class GatheredState:
    """Gathers, into tensors that are overwritten by the next gathering."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def storages(self) -> set[int]:
        """Addresses of the memory that is kept here; training does not change a tensor that lies in it."""
        return {kept.untyped_storage().data_ptr() for kept in self._kept.values()}

    @contextmanager
    def used_by(self, optimizer: Any) -> Iterator[None]:
        """Have Megatron-Core's optimizer gather this way.

        Args:
            optimizer: Megatron-Core's: one, or several chained.
        """
        several = getattr(optimizer, "chained_optimizers", [optimizer])
        patched = [one for one in several if hasattr(one, "get_parameter_state_dp_zero")]
        for number, one in enumerate(patched):
            one.get_parameter_state_dp_zero = self._gather_of(number, one, one.get_parameter_state_dp_zero)
        try:
            yield
        finally:
            for one in patched:
                del one.get_parameter_state_dp_zero

    def _gather_of(self, number: int, optimizer: Any, original: Any) -> Any:
        def gather(
            use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
        ) -> Any:
            if empty_data or return_on_all_ranks or not use_gloo_comm:
                return original(use_gloo_comm, empty_data, return_on_all_ranks)
            return self._gather(number, optimizer)

        return gather

    def _gather(self, number: int, optimizer: Any) -> dict[Any, Any] | None:
        group = optimizer.data_parallel_group_gloo
        first = group.rank() == 0
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for place, ranges in enumerate(optimizer.gbuf_ranges):
            [(dtype, buckets)] = ranges.items()
            buffer = optimizer.buffers[place]
            world = {
                key: self._memory((number, place, key), buffer.numel_unpadded if first else 0) for key in KEYS
            }
            offset = 0
            for bucket, range_map in zip(buffer.buckets, buckets, strict=True):
                end = offset + bucket.numel_unpadded
                for key in KEYS:
                    self._bucket(optimizer, bucket, range_map, key, world[key][offset:end], group)
                offset = end
            state[place] = {dtype: {**world, "numel_unpadded": buffer.numel_unpadded}}
        return state if first else None

    def _bucket(
        self, optimizer: Any, bucket: Any, range_map: Any, key: str, into: Tensor, group: Any
    ) -> None:
        """One bucket's part of one tensor, on the group's first rank."""
        size = bucket.grad_data.numel()
        if group.size() == 1:
            _fill(optimizer, range_map, key, into)
            return
        # What lies between parameters was cleared when the memory was made, and is never written to.
        mine = self._memory(("shard", id(bucket), key), size // group.size())
        _fill(optimizer, range_map, key, mine)
        parts = None
        if group.rank() == 0:
            whole = self._memory(("bucket",), size, at_least=True)[:size]
            parts = list(whole.split(size // group.size()))
        dist.gather(mine, parts, dist.get_process_group_ranks(group)[0], group)
        if parts is not None:
            into.copy_(whole[: bucket.numel_unpadded])

    def _memory(self, name: tuple[Any, ...], size: int, *, at_least: bool = False) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.numel() < size if at_least else kept.numel() != size):
            kept = self._kept[name] = torch.zeros(size, dtype=torch.float32)
        return kept


def _fill(optimizer: Any, range_map: Any, key: str, into: Tensor) -> None:
    for parameter, ranges in range_map["param_map"].items():
        local = ranges["gbuf_local"]
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        into[local.start : local.end].copy_(tensors[key].detach())
