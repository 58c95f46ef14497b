"""Causal attention on torch's `scaled_dot_product_attention`: no score matrix in memory, on CPU and CUDA."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.errors import ConfigError


class SDPAttention(MegatronModule):
    """Megatron-Core's `core_attention` submodule on `scaled_dot_product_attention`.

    Key/value heads are shared among query heads without being repeated, but in fp32 on CUDA. Constructor and
    `forward` follow `megatron.core.transformer.dot_product_attention.DotProductAttention`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        refused = {
            "context_parallel_size": config.context_parallel_size > 1,
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            "attn_mask_type": attn_mask_type != AttnMaskType.causal,
        }
        if any(refused.values()):
            raise ConfigError(
                "This attention cannot do what the transformer configuration asks.",
                where="model.layers: local",
                found=", ".join(name for name, asked in refused.items() if asked),
                expected="plain causal attention, without a window or context parallelism",
            )
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.grouped = config.num_attention_heads != config.num_query_groups

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sequence, batch, heads on this rank, head_dim].
            key: [sequence, batch, key/value heads on this rank, head_dim].
            value: As `key`.
            attention_mask: Must be None: the mask is causal and never built.
            attn_mask_type: Ignored; causal.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            [sequence, batch, heads on this rank * head_dim].
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SDPAttention is causal: it takes no mask, bias or packed sequences")
        # Strided views: [s, b, n, d] -> [b, n, s, d]. The kernels take them as they are.
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out = self._attend(q, k, v, dropout)
        else:
            out = self._attend(q, k, v, dropout)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        grouped = self.grouped
        if grouped and q.is_cuda and q.dtype == torch.float32:
            # On CUDA only the flash kernel shares heads, and it has no fp32; with shared heads torch would build the
            # scores. Repeated heads take the memory-efficient kernel.
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            grouped = False
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=grouped, scale=self.scale, dropout_p=dropout
        )
