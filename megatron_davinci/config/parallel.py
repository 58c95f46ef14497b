"""How the model and the batch are laid over ranks."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class ParallelConfig(Section):
    """The layout. Data parallelism is what remains: world size / (tensor * pipeline * context)."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where torch has it"
    )
    tensor: int = Field(default=1, ge=1, description="Tensor-parallel ranks")
    sequence: bool = Field(default=False, description="Sequence parallelism over the tensor group")
    pipeline: int = Field(default=1, ge=1, description="Pipeline ranks")
    virtual_pipeline: int = Field(
        default=1,
        ge=1,
        description="Model chunks of each pipeline rank, interleaved; more of them, and ranks wait less",
    )
    pipeline_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="Layers of each model chunk, in the order in which a sample passes them: `pipeline` * "
        "`virtual_pipeline` numbers; default: equally many",
    )
    context: int = Field(
        default=1, ge=1, description="Context-parallel ranks: each has a part of every sequence"
    )
    expert: int = Field(
        default=1,
        ge=1,
        description="Expert-parallel ranks: each has a part of the experts, and tokens travel",
    )
    expert_tensor: int = Field(
        default=1,
        ge=1,
        description="Tensor-parallel ranks of each expert; the rest of the model has `tensor`",
    )
    expert_dispatcher: Literal["alltoall", "allgather"] = Field(
        default="alltoall",
        description="How tokens reach their experts. alltoall: only where they are needed; allgather: everywhere",
    )
    distributed_optimizer: bool = Field(
        default=True,
        description="Shard optimizer state over data parallel ranks; Muon's by whole parameters",
    )
    overlap_gradient_reduce: bool = Field(
        default=False, description="Sum gradients over data-parallel ranks while the backward pass goes on"
    )
    overlap_parameter_gather: bool = Field(
        default=False,
        description="Gather updated weights while the next forward pass goes on; needs the two settings above",
    )
    overlap_tensor: bool = Field(
        default=False,
        description="Send activations between tensor ranks while the products go on (Transformer Engine's layers)",
    )
    optimizer_instances: int = Field(
        default=1,
        ge=1,
        description="Groups of data-parallel ranks that each shard the optimizer's state among themselves",
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="A collective that waits longer fails the run"
    )

    @property
    def model_ranks(self) -> int:
        """The smallest number of ranks that the layout goes on; a run has a multiple of them."""
        experts = self.expert * self.expert_tensor * self.pipeline
        return math.lcm(self.tensor * self.pipeline * self.context, experts)

    @property
    def groups(self) -> dict[str, int]:
        """The sizes of the process groups, as `platform.distributed.start` takes them."""
        names = (
            "tensor",
            "pipeline",
            "virtual_pipeline",
            "context",
            "expert",
            "expert_tensor",
            "optimizer_instances",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def chunks(self) -> int:
        """Model chunks that a sample passes, on all pipeline ranks together."""
        return self.pipeline * self.virtual_pipeline

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each model chunk, in the order in which a sample passes them.

        Chunk `n` is number `n // pipeline` of pipeline rank `n % pipeline`. Without `pipeline_layers` they have
        equally many; `check_layout` says where that does not go.
        """
        if self.pipeline_layers is not None:
            return tuple(self.pipeline_layers)
        return (num_layers // self.chunks,) * self.chunks

    @model_validator(mode="after")
    def _chunks_need_a_pipeline(self) -> ParallelConfig:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                "virtual_pipeline interleaves chunks of several pipeline ranks; it needs pipeline >= 2"
            )
        return self

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true splits activations over the tensor group; it needs tensor >= 2")
        return self
