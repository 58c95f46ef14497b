"""Attention on the package flash-attn, where it was asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_davinci.model.attention import SDPAttention


class FlashAttention(SDPAttention):
    """`SDPAttention` on flash-attn's kernels (Dao, 2023, arXiv 2307.08691): CUDA, half precision.

    Documents and context-parallel parts are computed in the same pieces, by flash-attn's variable-length kernel.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        self._whole, self._varlen = flash_attn_func, flash_attn_varlen_func
        # Its backward pass adds in no fixed order unless it is told to.
        self._deterministic = bool(config.deterministic_mode)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Causal attention of [batch, heads, positions, head_dim]; queries are the last ones of the keys."""
        out: Tensor = self._whole(
            *(x.transpose(1, 2) for x in (q, k, v)),
            dropout_p=dropout,
            softmax_scale=self.scale,
            causal=True,
            deterministic=self._deterministic,
        )
        return out.transpose(1, 2)

    def _varlen_kernel(self, query: Tensor, dropout: float) -> Callable[..., Any]:
        def attend(
            q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int,
            *, scale: float, **_: Any,
        ) -> Any:  # fmt: skip
            return self._varlen(
                q, k, v, q_bounds, k_bounds, longest_q, longest_k,
                dropout_p=dropout, softmax_scale=scale, causal=True, deterministic=self._deterministic,
            )  # fmt: skip

        return attend
