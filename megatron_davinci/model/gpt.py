"""Megatron-Core's GPT with rotary positions that may begin anew in every document."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_davinci.model.documents import Documents


class GPT(GPTModel):
    """A `GPTModel`. Given `Documents` with positions, its rotary embeddings are of those.

    Megatron-Core takes rotary positions from the place in the sequence and leaves `position_ids` unread, so this is
    where they are exchanged.
    """

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary, *rest = super()._preprocess(*args, **kwargs)
        documents = kwargs.get("packed_seq_params")
        if isinstance(documents, Documents) and documents.positions is not None:
            # [length, 1, 1, channels] of the whole sequence, of which each token takes its position's row.
            table = self.rotary_pos_emb.get_emb(documents.part.length)
            rotary = table[:, 0][documents.positions.t()]
        return (decoder_input, rotary, *rest)
