"""Frequencies of rotary positions, stretched for longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_davinci.config.rope import RopeScaling


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Stretch RoPE's wavelengths.

    `linear` divides every frequency by the factor (Chen et al., 2023, arXiv 2306.15595). `llama3` (Llama 3.1; its
    published `apply_scaling`) divides those whose wavelength exceeds `original / low_freq_factor`, leaves those below
    `original / high_freq_factor`, and goes from one to the other linearly in `original / wavelength`.

    Args:
        frequencies: [head_dim / 2] fp32, `base ** (-2 i / head_dim)`.
        scaling: How; None for not at all.
    """
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_sequence_length / (2 * math.pi / frequencies)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    scaled = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    # Untouched ones to the bit.
    return torch.where(
        turns > high, frequencies, torch.where(turns < low, frequencies / scaling.factor, scaled)
    )
