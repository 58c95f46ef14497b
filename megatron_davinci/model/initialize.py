"""Initial weights that depend on the seed and the weight's name alone: not on the layout, not on any order."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_davinci.model.experts import is_expert, whole_expert_name


def initialize(model: Any, seed: int, std: float) -> None:
    """Draw every weight from a generator keyed by the seed and the weight's own name.

    A tensor-parallel rank draws the whole matrix and keeps its part, so one seed gives one model on every TP, PP
    and DP. Matrices are normal with standard deviation `std`; those that write into the residual stream have
    `std / sqrt(2 * layers)` (GPT-2; Radford et al., 2019). Norm weights are 1, biases 0.

    Args:
        model: A model chunk of this rank, a Megatron-Core `GPTModel`.
        seed: The run's seed.
        std: Standard deviation.
    """
    layers = model.config.num_layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                key = global_name(name, model)
                residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
                deviation = std / math.sqrt(2 * layers) if residual else std
                parameter.copy_(_draw(parameter, key, seed, deviation, expert=is_expert(name)))


def global_name(name: str, model: Any) -> str:
    """The name of a parameter in the whole model: layers counted over all model chunks, experts over all ranks, tied
    weights named once.
    """
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    name = whole_expert_name(name, model.config)
    prefix, marker, rest = name.partition(".layers.")
    if not marker:
        return name
    number, _, tail = rest.partition(".")
    return (
        f"{prefix}.layers.{int(number) + get_transformer_layer_offset(model.config, model.vp_stage)}.{tail}"
    )


def _draw(parameter: Tensor, key: str, seed: int, std: float, *, expert: bool) -> Tensor:
    """The local part, in fp32 on the CPU, of the matrix that `key` names."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if expert:
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    split = ranks > 1 and getattr(parameter, "tensor_model_parallel", False)
    shape = list(parameter.shape)
    axis = getattr(parameter, "partition_dim", 0)
    if split:
        shape[axis] *= ranks
    whole = torch.empty(shape).normal_(0.0, std, generator=generator)
    if not split:
        return whole
    # The gate and the up projection are one matrix, and each is split over the ranks.
    halves = whole.chunk(2, axis) if key.endswith("linear_fc1.weight") else (whole,)
    return torch.cat([half.chunk(ranks, axis)[rank] for half in halves], axis)
