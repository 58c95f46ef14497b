"""What the training loop asks of other rooms; `cli` hands in what implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from megatron_davinci.model.documents import DocumentMask


class HeldOutLoss(Protocol):
    """Held-out loss by domain: nats a token, how many tokens it is the mean of, bits a byte."""

    @property
    def loss(self) -> dict[str, float]:
        """Nats a token, by domain."""
        ...

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that the loss is the mean of, by domain."""
        ...

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Bits a byte of text, by domain; without those whose bytes are not known, and on rank 0 only."""
        ...


class LossSum(Protocol):
    """Sums the model's loss over samples, on all ranks together (`Stepper.loss`)."""

    def __call__(
        self,
        tokens: Tensor | None,
        micro_batches: int,
        micro_batch_size: int,
        loss_mask: Tensor | None = None,
        document_mask: DocumentMask | None = None,
    ) -> tuple[float, float]:
        """Return the sum in nats over all ranks' labels that carry loss, and their number."""
        ...


class Evaluator(Protocol):
    """Measures the model in the loop. Called on every rank at the same step."""

    def evaluate(self, loss: LossSum) -> HeldOutLoss:
        """Measure, without changing the model."""
        ...

    def ask(self, chunks: Sequence[Module]) -> dict[str, dict[str, Any]]:
        """Scores of tasks by name, of this rank's parts of the model; none where none are asked for."""
        ...
