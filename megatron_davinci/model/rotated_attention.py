"""Megatron-Core's self-attention with this package's rotary positions."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_davinci.kernels.rope import Heads, rotate_
from megatron_davinci.model.branches import Branches


class RotatedAttention(SelfAttention):
    """Turns queries and keys where the projection has written them, in the pass that adds its bias.

    Megatron-Core turns them after it has taken them apart; here it is told of no rotary positions. Queries and keys
    with norms of their own are turned behind these. In a checkpoint nothing is different. Where attention follows
    `Branches`, which keep keys and values themselves, there is nothing for Megatron-Core to do in between.

    A group's queries lie before its key and its value, so that the queries of all groups are no tensor of four
    dimensions without a copy. Where attention can take it so, a group is a sequence of the batch: [positions, batch *
    groups, queries of a group, channels].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table: Tensor | None = None
        self._folds = False  # whether groups go into the batch
        norms = (self.q_layernorm, self.k_layernorm)
        gathered = self.config.num_query_groups < self.world_size
        self._packed = not gathered and all(norm is None or isinstance(norm, IdentityOp) for norm in norms)
        # The bias is then added as they turn.
        self.linear_qkv.skip_bias_add = self._packed

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [positions on this rank, batch, hidden size].
            attention_mask: As Megatron-Core's.
            args: The same.
            rotary_pos_emb: [positions, 1 or batch, 1, channels] fp32, from `kernels.rope.rotation_table`.
            kwargs: As Megatron-Core's.
        """
        assert rotary_pos_emb is not None, "there is no attention here without rotary positions"
        self._table = rotary_pos_emb
        branches = kwargs.get("packed_seq_params")
        self._folds = branches is None and getattr(self.core_attention, "takes_groups_as_batch", False)
        try:
            if isinstance(branches, Branches):
                query, key, value = self.get_query_key_value_tensors(hidden_states)
                attended = self.core_attention(query, key, value, None, packed_seq_params=branches)
                followed: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
                return followed
            out: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs
            )
        finally:
            self._table, self._folds = None, False
        return out

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: [positions, batch, heads on this rank, channels], the first two turned.

        Or [positions, batch * groups, heads of a group, channels], views of what the projection has written.
        """
        assert self._table is not None
        groups, channels = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        queries = self.num_attention_heads_per_partition // groups
        if self._packed:
            mixed, bias = self.linear_qkv(hidden_states)
            mixed = rotate_(mixed, self._table, Heads(groups, queries + 2, queries + 1), bias=bias)
            if self._folds:
                positions, batch = mixed.shape[:2]
                folded = mixed.view(positions, batch * groups, queries + 2, channels)
                query, key, value = folded.split([queries, 1, 1], 2)
                return query, key, value
            whole = mixed.view(*mixed.shape[:-1], groups, queries + 2, channels)
            query, key, value = whole.split([queries, 1, 1], -2)
            return query.flatten(2, 3), key.squeeze(-2), value.squeeze(-2)
        query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states, **options)
        return self._turned(query), self._turned(key), value

    def _turned(self, heads: Tensor) -> Tensor:
        """One set of heads, which is not packed with others."""
        assert self._table is not None
        number = heads.shape[-2]
        rows = heads.flatten(-2).contiguous()
        if rows.data_ptr() == heads.data_ptr():
            rows = rows.clone()  # a view of what others may need
        return rotate_(rows, self._table, Heads(1, number, number)).view(heads.shape)
