"""8-bit floating point in the layers' products."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class FP8Config(Section):
    """FP8 by Transformer Engine. Weights, gradients and the optimizer stay as `precision` says."""

    recipe: Literal["none", "delayed", "current", "block", "mxfp8"] = Field(
        default="none",
        description="Where scales come from: `delayed` from earlier steps, `current` from the tensor, `block` from "
        "blocks of 128 (Hopper), `mxfp8` from blocks of 32 (Blackwell)",
    )
    parameters: bool = Field(
        default=False,
        description="Keep the layers' matrices in FP8 beside their fp32 main weights, and gather them as that",
    )

    @property
    def megatron_recipe(self) -> str | None:
        """Megatron-Core's name of the recipe; None without one."""
        names = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise", "mxfp8": "mxfp8"}
        return names.get(self.recipe)

    @model_validator(mode="after")
    def _parameters_need_a_recipe(self) -> FP8Config:
        if self.parameters and self.recipe == "none":
            raise ValueError("parameters: true keeps FP8 matrices; it needs a recipe")
        return self
