"""A model that is only asked: its products and layers without what Megatron-Core sets up for gradients.

Megatron-Core's linear layers go through autograd functions and look up groups at every call, also where nothing is
differentiated, and its layers ask at each step what of dropout, recomputation, offloading and CUDA graphs there is to
do. For a token at a time that is most of the time. Here the same products and sums are called directly, with the same
modules for what lies between them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.model.branches import Branches


def without_gradients(model: torch.nn.Module) -> None:
    """Exchange, in place, the `forward` of layers that have nothing but products and sums to do.

    Layers of other types than Megatron-Core's own, of sequence parallelism, of products of few bits, of our SwiGLU
    and of experts on several ranks stay as they are. What comes out is the same, bit for bit. A whole transformer
    layer goes the short way where it is asked for `Branches`.

    Args:
        model: In evaluation mode from here on; it must not be trained again.
    """
    for layer in model.modules():
        if type(layer) is ColumnParallelLinear and _plain(layer) and not layer.gather_output:
            layer.forward = partial(_columns, layer)
        elif type(layer) is RowParallelLinear and _plain(layer) and layer.input_is_parallel:
            layer.forward = partial(_rows, layer)
        elif type(layer) is MLP and _silu_gated(layer):
            layer.forward = partial(_swiglu, layer)
        elif type(layer) is TransformerLayer and _adds_and_nothing_else(layer):
            layer.forward = partial(_layer, layer)


def _plain(layer: Any) -> bool:
    return not (
        layer.sequence_parallel
        or layer.explicit_expert_comm
        or layer.config.cpu_offloading
        or "forward" in vars(layer)
        # Products of few bits, or one that makes its input of gates.
        or "_forward_impl" in vars(layer)
    )


def _silu_gated(layer: Any) -> bool:
    config = layer.config
    return (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
        and not config.add_bias_linear
        and "forward" not in vars(layer)
    )


def _adds_and_nothing_else(layer: Any) -> bool:
    config = layer.config
    return (
        layer.self_attn_bda is get_bias_dropout_add
        and layer.mlp_bda is get_bias_dropout_add
        and isinstance(layer.pre_cross_attn_layernorm, IdentityOp)
        and isinstance(layer.cross_attention, IdentityOp)
        and not config.fp32_residual_connection
        and not config.inference_fuse_tp_communication
        and not config.fine_grained_activation_offloading
        and config.cuda_graph_impl == "none"
        and "forward" not in vars(layer)
    )


def _layer(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    branches = kwargs.get("packed_seq_params")
    if not isinstance(branches, Branches):
        whole: tuple[Tensor, Tensor | None] = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return whole
    attended = layer.self_attention(
        layer.input_layernorm(hidden_states),
        None,
        rotary_pos_emb=kwargs["rotary_pos_emb"],
        packed_seq_params=branches,
    )
    hidden_states = _added(attended, hidden_states)
    return _added(layer.mlp(layer.pre_mlp_layernorm(hidden_states)), hidden_states), None


def _added(product: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
    """A product with its bias upon the residual, in place: nobody else has what was made."""
    made, bias = product
    if bias is not None:
        made.add_(bias)
    return made.add_(residual)


def _columns(
    layer: Any, inputs: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    if runtime_gather_output:
        gathered: tuple[Tensor, Tensor | None] = type(layer).forward(layer, inputs, weight, True)
        return gathered
    bias = layer.bias
    product = F.linear(inputs, layer.weight if weight is None else weight)
    if bias is None or layer.skip_bias_add:
        return product, bias
    return product + bias, None


def _rows(layer: Any, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    product = F.linear(inputs, layer.weight)
    if layer.tp_group.size() > 1:
        dist.all_reduce(product, group=layer.tp_group)
    bias = layer.bias
    if bias is None or layer.skip_bias_add:
        return product, bias
    return product + bias, None


def _swiglu(
    layer: Any, hidden: Tensor, per_token_scale: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor | None]:
    # An MLP that is not experts reads no other keyword in Megatron-Core either.
    if per_token_scale is not None:
        scaled: tuple[Tensor, Tensor | None] = type(layer).forward(layer, hidden, per_token_scale)
        return scaled
    gate, up = layer.linear_fc1(hidden)[0].chunk(2, dim=-1)
    made: tuple[Tensor, Tensor | None] = layer.linear_fc2(F.silu(gate).mul_(up))
    return made
