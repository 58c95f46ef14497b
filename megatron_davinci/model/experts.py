"""Layers of experts in Megatron-Core's words, and what must hold for their parameters."""

from __future__ import annotations

import re
from typing import Any

from megatron.core import parallel_state

from megatron_davinci.config import RunConfig

_EXPERT = re.compile(
    r"\.mlp\.experts\.(?:local_experts\.(?P<sequential>\d+)\.(?P<rest>.*)|(?P<linear>linear_fc\d\.\w+?)(?P<grouped>\d+))$"
)
_BALANCE = {"sequence": "seq_aux_loss", "micro_batch": "aux_loss", "none": "none"}


def expert_settings(config: RunConfig, *, grouped: bool) -> dict[str, Any]:
    """What `model.experts` and the expert layout set in a `TransformerConfig`.

    Args:
        config: The run configuration.
        grouped: Whether the experts of a rank are computed in one kernel, by Transformer Engine.
    """
    experts, parallel = config.model.experts, config.parallel
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": config.model.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_router_topk": experts.top_k,
        # A softmax over a single score is 1 whatever the score, and the router would learn nothing from the loss.
        "moe_router_pre_softmax": experts.top_k == 1,
        "moe_router_load_balancing_type": _BALANCE[experts.balance],
        "moe_aux_loss_coeff": 0.0 if experts.balance == "none" else experts.balance_coefficient,
        "moe_z_loss_coeff": experts.router_z_loss or None,
        # Scores that are nearly equal decide where a token goes.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": parallel.expert_dispatcher,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def is_expert(name: str) -> bool:
    """Whether a parameter of a model chunk is an expert's; the router and shared experts are not."""
    return _EXPERT.search(name) is not None


def whole_expert_name(name: str, config: Any) -> str:
    """The name of an expert's parameter with its number among all experts, the same whoever computes them.

    Args:
        name: The parameter's name in a model chunk.
        config: The chunk's `TransformerConfig`.
    """
    found = _EXPERT.search(name)
    if found is None:
        return name
    here = config.num_moe_experts // config.expert_model_parallel_size
    first = here * parallel_state.get_expert_model_parallel_rank()
    number = first + int(found["sequential"] or found["grouped"])
    return f"{name[: found.start()]}.mlp.experts.{number}.{found['rest'] or found['linear']}"


def mark_experts(chunk: Any) -> None:
    """Have the experts' gradients summed, and their optimizer state kept, over the experts' own groups.

    Megatron-Core does so only with more than one expert-parallel rank. With one it treats them as ordinary weights,
    which sums their gradients over too few ranks where `expert_tensor` is not `tensor`, and puts them into another
    optimizer than the one that a checkpoint of several expert-parallel ranks has them in.

    Args:
        chunk: A model chunk, not yet wrapped for data parallelism.
    """
    for name, parameter in chunk.named_parameters():
        if is_expert(name):
            parameter.allreduce = False
