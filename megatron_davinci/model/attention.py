"""Causal attention on torch's `scaled_dot_product_attention`: no score matrix in memory, on CPU and CUDA.

Confined to documents, and over the sequence parts of context-parallel ranks, it is computed in `pieces`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from megatron_davinci.errors import ConfigError
from megatron_davinci.model.branches import Branches
from megatron_davinci.model.context_parallel import SequencePart, gather_sequence
from megatron_davinci.model.documents import Documents
from megatron_davinci.model.pieces import Pieces, cut_whole

_VARLEN_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


class SDPAttention(MegatronModule):
    """Megatron-Core's `core_attention` submodule on `scaled_dot_product_attention`.

    Key/value heads are shared among query heads without being repeated, but in fp32 on CUDA. Constructor and
    `forward` follow `megatron.core.transformer.dot_product_attention.DotProductAttention`.

    Context-parallel ranks gather the keys and values of the whole sequence, which are few in grouped-query attention,
    and each attends with its own queries. In the backward pass their gradients are summed and scattered.
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
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            "attn_mask_type": attn_mask_type != AttnMaskType.causal,
        }
        if any(refused.values()):
            raise ConfigError(
                "This attention cannot do what the transformer configuration asks.",
                where="backends.attention",
                found=", ".join(name for name, asked in refused.items() if asked),
                expected="causal attention without a window",
            )
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.layer_number = layer_number
        self.grouped = config.num_attention_heads != config.num_query_groups
        # A tensor rank has one key/value head at least.
        self.groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
        self.context_group: Any = None
        if config.context_parallel_size > 1:
            self.context_group = (
                parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
            )

    @property
    def takes_groups_as_batch(self) -> bool:
        """Whether groups of heads may come in the batch; each attends by itself anyhow.

        Queries are then [positions, batch * groups, heads of a group, head_dim], keys and values the same with one.
        """
        return self.context_group is None

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
            query: [positions on this rank, batch, heads on this rank, head_dim].
            key: [positions on this rank, batch, key/value heads on this rank, head_dim].
            value: As `key`.
            attention_mask: Must be None: the mask is causal and never built.
            attn_mask_type: Ignored; causal.
            attention_bias: Must be None.
            packed_seq_params: `Documents` that attention is confined to, `Branches` that it follows, or None.

        Returns:
            [positions on this rank, batch, heads on this rank * head_dim].
        """
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("SDPAttention is causal: it takes no mask or bias")
        if isinstance(packed_seq_params, Branches):
            out = packed_seq_params.attend(self.layer_number, query, key, value, self.scale)
            return out.flatten(2)
        if packed_seq_params is not None and not isinstance(packed_seq_params, Documents):
            raise NotImplementedError(
                "SDPAttention takes documents as `Documents`, not packed in another way"
            )
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out = self._attend(query, key, value, packed_seq_params, dropout)
        else:
            out = self._attend(query, key, value, packed_seq_params, dropout)
        folded = self.groups // key.shape[2]  # groups in the batch
        return out.reshape(query.shape[0], query.shape[1] // folded, -1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, dropout: float
    ) -> Tensor:
        """[positions, batch, heads, head_dim], or with the first two in one."""
        if documents is None and self.context_group is None:
            # Strided views: [s, b, n, d] -> [b, n, s, d]. The kernels take them as they are.
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._causal(q, k, v, dropout).permute(2, 0, 1, 3)
        positions, batch = query.shape[:2]
        if self.context_group is not None:
            both = gather_sequence(torch.cat([key, value], dim=2), self.context_group)
            key, value = both.split([key.shape[2], value.shape[2]], dim=2)
        kernel = self._varlen_kernel(query, dropout)
        device, by_size = query.device, kernel is None
        if documents is not None:
            pieces = documents.pieces(device, by_size=by_size)
        else:
            ranks, rank = self.context_group.size(), self.context_group.rank()
            part = SequencePart(positions * ranks, ranks, rank)
            pieces = cut_whole(batch, part, device, by_size=by_size)
        q = pieces.queries.take(query.flatten(0, 1))
        k, v = (pieces.keys.take(x.flatten(0, 1)) for x in (key, value))
        if kernel is None:
            out = self._piece_by_piece(q, k, v, pieces, dropout)
        else:
            out = kernel(
                q,
                k,
                v,
                pieces.query_bounds,
                pieces.key_bounds,
                pieces.longest_queries,
                pieces.longest_keys,
                scale=self.scale,
                # Nothing to the right: causal, aligned at the end of queries and keys.
                window_size=(-1, 0),
                enable_gqa=self.grouped,
            )
        return pieces.queries.put_back(out)

    def _varlen_kernel(self, query: Tensor, dropout: float) -> Callable[..., Any] | None:
        return varlen_kernel(query, dropout)

    def _piece_by_piece(self, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, dropout: float) -> Tensor:
        """[tokens, heads, head_dim] in the pieces' order; those of one size are computed at once."""
        groups = pieces.groups
        queries = q.split([count * size for count, size, _ in groups])
        keys, values = (x.split([count * seen for count, _, seen in groups]) for x in (k, v))
        out = []
        for (count, *_), *parts in zip(groups, queries, keys, values, strict=True):
            # [pieces * size, n, d] -> [pieces, n, size, d]
            qs, ks, vs = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)
            out.append(self._causal(qs, ks, vs, dropout).transpose(1, 2).flatten(0, 1))
        return torch.cat(out)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Causal attention of [batch, heads, positions, head_dim]; queries are the last ones of the keys."""
        grouped = self.grouped
        if grouped and q.is_cuda and q.dtype == torch.float32:
            # On CUDA only the flash kernel shares heads, and it has no fp32; with shared heads torch would build the
            # scores. Repeated heads take the memory-efficient kernel.
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            grouped = False
        mask = None
        before = k.shape[2] - q.shape[2]
        if before:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=grouped,
            scale=self.scale,
            dropout_p=dropout,
        )


def varlen_kernel(query: Tensor, dropout: float) -> Callable[..., Any] | None:
    """The kernel that computes all pieces at once: torch's varlen flash attention; None where it cannot be used.

    It is on CUDA only, in half precision only, and has no dropout.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return varlen_attn if _VARLEN_SHARES_HEADS else _varlen_with_repeated_heads
    return None


def _varlen_with_repeated_heads(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, enable_gqa: bool, **named: Any
) -> Tensor:
    """torch 2.11's kernel, which has no `enable_gqa`: shared heads are repeated for it.

    Args:
        query: [tokens, heads, head_dim].
        key: [tokens, key/value heads, head_dim].
        value: As `key`.
        arguments: The rest of `varlen_attn`'s.
        enable_gqa: Whether heads are shared.
        named: As `arguments`.
    """
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    out = varlen_attn(query, key, value, *arguments, **named)
    assert isinstance(out, Tensor), "the sums of the scores were not asked for"
    return out
