"""Megatron-Core's GPT with rotary positions that may begin anew in every document, or follow branches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_davinci.config.rope import RopeScaling
from megatron_davinci.kernels.cross_entropy import Losses, vocab_parallel_cross_entropy
from megatron_davinci.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_davinci.kernels.rope import rotation_table
from megatron_davinci.model.branches import Branches
from megatron_davinci.model.documents import Documents
from megatron_davinci.model.loss import cross_entropy_and_z_loss
from megatron_davinci.model.rope import scale_frequencies
from megatron_davinci.model.sharpness import SharpnessMonitor


class GPT(GPTModel):
    """A `GPTModel`. Given `Documents` with positions or `Branches`, its rotary embeddings are of those positions.

    Megatron-Core takes rotary positions from the place in the sequence and leaves `position_ids` unread, so this is
    where they are exchanged.

    Args:
        z_loss: Weight of the z-loss, which is added in training and not when the model only evaluates; 0 for none.
        rope_scaling: Stretched wavelengths; None for none.
        vocab_padding: Rows at the end of the vocabulary that are no token's. The loss is as if they were not there.
        own_loss: Take the cross entropy of `kernels`, which overwrites the logits, instead of Megatron-Core's.
        loss_chunk: With `own_loss`: tokens whose logits are there at once; None for all.
        own_rope: Hand on cosines and sines, as `RotatedAttention` takes them, in place of angles.

    Attributes:
        low_precision: Of a rank's first chunk: the products of few bits of all its chunks; None for none.
        sharpness: Is given the last token's logits in training, where it asks for them; None for nobody.
    """

    low_precision: Any = None
    sharpness: SharpnessMonitor | None = None

    def __init__(
        self,
        *args: Any,
        z_loss: float = 0.0,
        rope_scaling: RopeScaling | None = None,
        vocab_padding: int = 0,
        own_loss: bool = False,
        loss_chunk: int | None = None,
        own_rope: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        self.tokens = self.vocab_size - vocab_padding
        self.own_loss, self.loss_chunk, self.own_rope = own_loss, loss_chunk, own_rope
        self._head: _HeadInLoss | None = None
        if loss_chunk is not None and self.post_process:
            self._head = _HeadInLoss(self.output_layer)
        self._turns: Tensor | None = None  # what `_turns_at` has made so far
        self.rotary_pos_emb.inv_freq = scale_frequencies(self.rotary_pos_emb.inv_freq, rope_scaling)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The loss of each label: [batch, sequence], or [2, batch, sequence] with the z-loss beside it.

        Args:
            labels: [batch, sequence] int64.
            logits: [sequence, batch, vocabulary on this rank]; with `loss_chunk` hidden states in their place.
        """
        if self.own_loss:
            losses = self._own_losses(labels.transpose(0, 1).contiguous(), logits)
            of_labels = losses.cross_entropy.transpose(0, 1).contiguous()
            return (
                of_labels
                if losses.z_loss is None
                else torch.stack([of_labels, losses.z_loss.transpose(0, 1)])
            )
        if self.tokens < self.vocab_size:
            logits = self._without_padding(logits)
        if self.z_loss and self.training:
            both = cross_entropy_and_z_loss(logits, labels.transpose(0, 1).contiguous(), self.z_loss)
            return both.transpose(1, 2).contiguous()
        return super().compute_language_model_loss(labels, logits)

    def _own_losses(self, labels: Tensor, logits: Tensor) -> Losses:
        group = parallel_state.get_tensor_model_parallel_group()
        z_loss = self.z_loss if self.training else 0.0
        if self._head is None or self.loss_chunk is None:
            return vocab_parallel_cross_entropy(
                logits, labels, group=group, tokens=self.tokens, z_loss=z_loss
            )
        # As Megatron-Core's output layer does it: what ranks' parts of the gradient come to is summed here.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(logits, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(logits, group=group)
        return linear_cross_entropy(
            hidden,
            self._head.weight,
            labels,
            group=group,
            tokens=self.tokens,
            z_loss=z_loss,
            chunk=self.loss_chunk,
        )

    def _without_padding(self, logits: Tensor) -> Tensor:
        here = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * here
        ids = torch.arange(first, first + here, device=logits.device)
        return logits.masked_fill(ids >= self.tokens, float("-inf"))

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        documents = kwargs.get("packed_seq_params")
        if isinstance(documents, Branches):
            hidden = self.embedding(kwargs["input_ids"], None) if self.pre_process else None
            return hidden, self._turns_at(documents.positions), None, None, None, None
        decoder_input, rotary, *rest = super()._preprocess(*args, **kwargs)
        if isinstance(documents, Documents) and documents.positions is not None:
            # [length, 1, 1, channels] of the whole sequence, of which each token takes its position's row.
            table = self.rotary_pos_emb.get_emb(documents.part.length)
            rotary = table[:, 0][documents.positions.t()]
        if self.own_rope:
            rotary = rotation_table(rotary)
        return (decoder_input, rotary, *rest)

    def _turns_at(self, positions: Tensor) -> Tensor:
        """What turns queries and keys at [rows, length] positions: [length, rows, 1, channels] of a kept table."""
        needed = int(positions.max()) + 1
        if self._turns is None or len(self._turns) < needed:
            angles = self.rotary_pos_emb.get_emb(1 << (needed - 1).bit_length())[:, 0]
            self._turns = rotation_table(angles) if self.own_rope else angles
        return self._turns[positions.t()]

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        branches = kwargs.get("packed_seq_params")
        if not (self.post_process and isinstance(branches, Branches) and branches.read is not None):
            labels = kwargs.get("labels")
            if labels is not None and self.post_process and self.training:
                self._look_at_sharpness(hidden_states, labels)
            head = self._head if labels is not None else None
            with nullcontext() if head is None else head.left_to_the_loss():
                out: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
            return out
        tokens = hidden_states.transpose(0, 1).flatten(0, 1)
        parts = []
        for first in range(0, len(branches.outputs), branches.at_once):
            some = tokens[branches.outputs[first : first + branches.at_once]]
            if branches.states:
                parts.append(branches.read(some, first))
                continue
            # [1, outputs, vocabulary on this rank]
            logits = super()._postprocess(some.unsqueeze(1), *args, **kwargs)[0]
            logits = self._without_padding(logits) if self.tokens < self.vocab_size else logits
            parts.append(branches.read(logits, first))
        return torch.cat(parts)

    @torch.no_grad()
    def _look_at_sharpness(self, hidden: Tensor, labels: Tensor) -> None:
        """Of the last position here. Under sequence parallelism each tensor rank gives one: the last rank's it is."""
        monitor, weight = self.sharpness, None
        if monitor is None or not monitor.on:
            return
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits = self.output_layer(hidden[-1:].detach(), weight=weight)[0][-1]
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        group = parallel_state.get_tensor_model_parallel_group()
        monitor.add(logits, labels[:, -1], tokens=self.tokens, first=first, group=group)


class _HeadInLoss:
    """The output layer, which at times hands hidden states on: the loss then multiplies, chunk by chunk.

    Args:
        layer: Megatron-Core's `ColumnParallelLinear`, whose `forward` is wrapped in place.
    """

    def __init__(self, layer: Any) -> None:
        self._layer, self._own_forward, self._left = layer, layer.forward, False
        self._given: Tensor | None = None
        layer.forward = self._forward

    @property
    def weight(self) -> Tensor:
        """Of the product that was left to the loss."""
        weight: Tensor = self._layer.weight if self._given is None else self._given
        return weight

    @contextmanager
    def left_to_the_loss(self) -> Iterator[None]:
        """A context in which the layer multiplies nothing."""
        self._left = True
        try:
            yield
        finally:
            self._left, self._given = False, None

    def _forward(self, hidden: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
        if not self._left:
            made: tuple[Tensor, None] = self._own_forward(hidden, weight=weight, **options)
            return made
        self._given = weight
        return hidden, None
