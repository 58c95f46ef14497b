"""What joins `DavinciAdamW` to Megatron-Core's optimizers around it, on instances and through their own methods.

- Gradients are not scaled in place, which reads and writes all of them: the division by the global batch's tokens and
  the clip coefficient go into the update. Till then `main_grad` holds the gradient of the summed loss.
- The update writes the bf16 parameters that follow from the main weights it changes; no second pass copies them.
- Where moments are in 8 bits, checkpoints get and give fp32 numbers. These are cut otherwise on another layout, and
  groups with them; on the same layout the codes come back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.optim.davinci import DavinciAdamW


def join(optimizer: Any, clip_grad_norm: float, mcore: Any) -> None:
    """Join all that is ours in an optimizer of Megatron-Core's.

    Args:
        optimizer: A `ChainedOptimizer` whose configuration does not clip.
        clip_grad_norm: The largest norm of the gradient; 0 for any.
        mcore: The model chunks' `TransformerConfig`, whose `finalize_model_grads_func` is Megatron-Core's.
    """
    parts = [one for one in optimizer.chained_optimizers if not getattr(one, "is_stub_optimizer", False)]
    ours = [one for one in parts if isinstance(getattr(one, "optimizer", None), DavinciAdamW)]
    # Others would take gradients as they lie.
    mean = _divide_in_update(mcore) if len(ours) == len(parts) else None
    _scale_in_update(optimizer, [one.optimizer for one in ours], mean, clip_grad_norm)
    for one in ours:
        one.optimizer.make_states()
        if hasattr(one, "gbuf_ranges"):  # the distributed optimizer
            if one.optimizer.fp8_moments:
                _store_numbers(one)
            _copy_in_update(one)


class _Mean:
    """What makes the gradient of a step's mean loss of that of its sum.

    Attributes:
        factor: One by the weight of all labels of the global batch; 1 where gradients are divided already.
    """

    factor = 1.0


def _divide_in_update(mcore: Any) -> _Mean:
    """Have the number of tokens added up over ranks, and gradients left as they are."""
    finalize, mean = mcore.finalize_model_grads_func, _Mean()

    def finalized(model: Any, num_tokens: Tensor | None = None, *args: Any, **keywords: Any) -> None:
        finalize(model, None, *args, **keywords)
        mean.factor = 1.0
        if num_tokens is None:
            return
        # As Megatron-Core's `finalize_model_grads`: only the last pipeline stage has counted.
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(num_tokens, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        mean.factor = 1.0 / max(1, int(num_tokens))

    mcore.finalize_model_grads_func = finalized
    return mean


def _scale_in_update(optimizer: Any, inner: list[DavinciAdamW], mean: _Mean | None, largest: float) -> None:
    measure = optimizer.get_grad_norm

    def measured() -> float:
        factor = 1.0 if mean is None else mean.factor
        norm = float(measure()) * factor
        # Megatron-Core's coefficient (`clip_grad_by_total_norm_fp32`).
        coefficient = largest / (norm + 1e-6) if largest > 0 else 1.0
        for one in inner:
            one.gradient_scale = factor * (coefficient if coefficient < 1 else 1.0)
        return norm

    optimizer.get_grad_norm = measured


def _copy_in_update(one: Any) -> None:
    copies = dict(_model_shards(one))
    mains = [main for group in one.optimizer.param_groups for main in group["params"]]
    own = {
        id(shard) for group in one.shard_fp32_groups for shard in group
    }  # parts of fp32 parameters themselves
    # Parameters in FP8 are made of all main weights at once.
    if any(main not in copies and id(main) not in own for main in mains):
        return
    one.optimizer.copies = copies
    step = one.step_with_ready_grads

    def stepped() -> Any:
        one._copy_main_params_to_model_params = lambda: None
        try:
            return step()
        finally:
            del one._copy_main_params_to_model_params

    one.step_with_ready_grads = stepped


def _model_shards(one: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Main weights, and the part of the bf16 parameters' buffer that follows from them."""
    pairs = zip(one.shard_fp32_from_float16_groups, one.model_float16_groups, strict=True)
    for mains, models in pairs:
        for main, model in zip(mains, models, strict=True):
            if main is None or model.dtype != torch.bfloat16 or type(model.data) is not Tensor:
                continue
            place = one._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            number, _, bucket = one.model_param_gbuf_map[model]
            buffer = one.buffers[number].buckets[bucket].param_data
            if buffer is not None and buffer.dtype == torch.bfloat16:
                yield main, buffer.view(-1)[place.start : place.end]


class _Numbers(Mapping[str, Tensor]):
    """What a checkpoint stores of a parameter; moments are decoded when they are asked for."""

    def __init__(self, inner: DavinciAdamW, main: Tensor) -> None:
        self._inner, self._main = inner, main

    def __getitem__(self, key: str) -> Tensor:
        return self._main if key == "param" else self._inner.moments_of(self._main)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("param", "exp_avg", "exp_avg_sq"))

    def __len__(self) -> int:
        return 3


def _store_numbers(one: Any) -> None:
    def main_of(model: Any) -> Tensor:
        group, order = one.model_param_group_index_map[model]
        main: Tensor = one.optimizer.param_groups[group]["params"][order]
        return main

    def get(model: Any) -> Mapping[str, Tensor]:
        return _Numbers(one.optimizer, main_of(model))

    def put(model: Any, tensors: Mapping[str, Tensor]) -> None:
        main = main_of(model)
        main.copy_(tensors["param"])
        one.optimizer.set_moments(main, dict(tensors))

    getter: Callable[[Any], Mapping[str, Tensor]] = get
    one._get_main_param_and_optimizer_states = getter
    one._set_main_param_and_optimizer_states = put
