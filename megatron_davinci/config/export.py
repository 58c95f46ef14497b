"""Exports to Hugging Face while a run is at work."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_davinci.config.section import Section


class ExportConfig(Section):
    """Export saved checkpoints to RUN/hf in the background, by a process of the lowest priority."""

    every: int | None = Field(
        default=None,
        gt=0,
        description="Steps, a multiple of checkpoint.every_steps; besides the run's last one, null for that only",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Of the weights; null: as stored"
    )
    licence: str | None = Field(default=None, description="For the model cards, such as apache-2.0")
    verify: bool = Field(default=True, description="Hold each export against transformers before it appears")
