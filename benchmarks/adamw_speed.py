"""How fast AdamW is on a GPU, at the report's model of 3.09 billion parameters, beside torch's fused one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels import moments
from megatron_davinci.kernels.adamw import Update, adamw_, adamw_fp8_moments_

HIDDEN, FEED_FORWARD, LAYERS, VOCABULARY, QKV = 2048, 11_008, 36, 151_936, 2560
FULL_BYTES = (
    30  # a parameter: fp32 parameter, both moments (read and written), gradient (read), bf16 copy (written)
)
CODED_BYTES = 18.25  # the same with a byte a moment, and 16 bytes of ranges a group of 128
TORCH_BYTES = 28  # no copy
UPDATE = Update(1e-4, 0.9, 0.95, 1e-8, 0.1, step=100, gradient_scale=0.5)


def sizes() -> list[int]:
    """Elements of each parameter tensor of the model on one GPU."""
    layer = [
        QKV * HIDDEN,
        QKV,
        HIDDEN * HIDDEN,
        2 * FEED_FORWARD * HIDDEN,
        FEED_FORWARD * HIDDEN,
        HIDDEN,
        HIDDEN,
    ]
    return [VOCABULARY * HIDDEN, *layer * LAYERS, HIDDEN]


def measure(
    device: torch.device, copy: float, seconds: Callable[[Callable[[], object]], float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Times, and torch's.

    Args:
        device: With 57 GB free.
        copy: Bytes a second that a copy reads and writes.
        seconds: Takes the time of an action.
    """
    torch.cuda.empty_cache()
    counts = sizes()
    total = sum(counts)

    def make(dtype: torch.dtype, scale: float = 0.0) -> list[Tensor]:
        made = [torch.zeros(n, dtype=dtype, device=device) for n in counts]
        if scale:
            for one in made:
                one.normal_(std=scale)
        return made

    parameters, gradients = make(torch.float32, 0.02), make(torch.float32, 1e-3)

    def full() -> float:
        moments_, copies = (make(torch.float32), make(torch.float32)), make(torch.bfloat16)
        return seconds(lambda: adamw_(parameters, gradients, *moments_, UPDATE, copies))

    def coded() -> tuple[float, float]:
        codes, copies = (make(torch.uint8), make(torch.uint8)), make(torch.bfloat16)
        ranges = [torch.zeros(moments.groups(n), 4, device=device) for n in counts]
        state = sum(one.nbytes for one in (*codes[0], *codes[1], *ranges)) / total
        taken = seconds(lambda: adamw_fp8_moments_(parameters, gradients, *codes, ranges, UPDATE, copies))
        return taken, state

    def torchs() -> float:
        leaves = [torch.nn.Parameter(one) for one in parameters]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        return seconds(
            torch.optim.AdamW(leaves, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step
        )

    ours = full()
    torch.cuda.empty_cache()
    in_8_bits, state = coded()
    torch.cuda.empty_cache()
    theirs = torchs()
    figures = {
        "adamw_parameters": total,
        "adamw_ms": 1e3 * ours,
        "adamw_fraction_of_copy": FULL_BYTES * total / ours / copy,
        "adamw_fp8_ms": 1e3 * in_8_bits,
        "adamw_fp8_fraction_of_copy": CODED_BYTES * total / in_8_bits / copy,
        "adamw_fp8_state_bytes_per_parameter": state,
    }
    peer = {
        "torch_fused_adamw_ms": 1e3 * theirs,
        "torch_fused_adamw_bytes_per_parameter": TORCH_BYTES,
        "torch_fused_adamw_fraction_of_copy": TORCH_BYTES * total / theirs / copy,
        "torch_fused_adamw_state_bytes_per_parameter": 8,
    }
    return figures, peer
