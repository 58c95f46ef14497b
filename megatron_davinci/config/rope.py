"""Rotary positions whose wavelengths are stretched, as models for long contexts have them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class RopeScaling(Section):
    """How the frequencies of RoPE are scaled. Formulas are in `model/rope.py`."""

    kind: Literal["linear", "llama3"] = Field(
        description="linear: all frequencies over `factor` (Chen et al., 2023); llama3: only the low ones (Llama 3.1)"
    )
    factor: float = Field(ge=1, description="How far the wavelengths are stretched")
    low_freq_factor: float = Field(
        default=1.0, gt=0, description="llama3: wavelengths over original / this are stretched in full"
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="llama3: wavelengths under original / this are left as they are"
    )
    original_max_sequence_length: int = Field(
        default=8192, gt=0, description="llama3: the context that the model had before it was stretched"
    )

    @model_validator(mode="after")
    def _only_what_acts(self) -> RopeScaling:
        for name in ("low_freq_factor", "high_freq_factor", "original_max_sequence_length"):
            if self.kind == "linear" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} acts with kind: llama3; found kind: linear")
        return self

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RopeScaling:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) is not below high_freq_factor ({self.high_freq_factor})"
            )
        return self
