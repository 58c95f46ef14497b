"""How the model and the batch are laid over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class ParallelConfig(Section):
    """The layout. Data parallelism is what remains: world size / (tensor * pipeline * context)."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where torch has it"
    )
    tensor: int = Field(default=1, ge=1, description="Tensor-parallel ranks")
    sequence: bool = Field(default=False, description="Sequence parallelism over the tensor group")
    pipeline: int = Field(default=1, ge=1, description="Pipeline stages")
    context: int = Field(
        default=1, ge=1, description="Context-parallel ranks: each has a part of every sequence"
    )
    distributed_optimizer: bool = Field(
        default=True, description="Shard optimizer state over data parallel ranks"
    )
    overlap_gradient_reduce: bool = Field(
        default=False, description="Sum gradients over data-parallel ranks while the backward pass goes on"
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="A collective that waits longer fails the run"
    )

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one sample together; a run has a multiple of them."""
        return self.tensor * self.pipeline * self.context

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true splits activations over the tensor group; it needs tensor >= 2")
        return self
