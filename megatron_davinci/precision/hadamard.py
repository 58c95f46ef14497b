"""The random Hadamard transform: outliers spread over 16 neighbours, and products stay what they are.

NVIDIA, 2025, Pretraining Large Language Models with NVFP4, arXiv 2509.25149, section 4.2: both operands of the weight
gradient's product are multiplied, along the tokens that it sums over, by a 16 x 16 Hadamard matrix with random signs,
the same for all layers. The matrix is orthogonal, so the product is the same but for what rounding does to it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

WIDTH = 16
"""Numbers that are mixed with each other."""


@lru_cache(maxsize=64)
def signs(seed: int) -> tuple[int, ...]:
    """One of +1 and -1 for each of the 16 places.

    Args:
        seed: The run's.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=2, person=b"hadamard v1").digest()
    word = int.from_bytes(digest, "little")
    return tuple(1 if word >> place & 1 else -1 for place in range(WIDTH))


@lru_cache(maxsize=64)
def matrix(seed: int, device: torch.device) -> Tensor:
    """Signs times Sylvester's Hadamard matrix over 4: [16, 16] fp32, orthogonal, all of ±1/4.

    Args:
        seed: The run's.
        device: Where it lies.
    """
    h = torch.ones(1, 1)
    while h.shape[0] < WIDTH:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (torch.tensor(signs(seed), dtype=torch.float32).unsqueeze(1) * h / 4).to(device)


def transform(x: Tensor, seed: int, *, inverse: bool = False) -> Tensor:
    """Mix each 16 neighbours of the last dimension.

    Args:
        x: [..., n] fp32 with n a multiple of 16.
        seed: The run's.
        inverse: Undo it.

    Raises:
        ValueError: `n` is no multiple of 16.
    """
    if x.shape[-1] % WIDTH:
        raise ValueError(f"rows of {x.shape[-1]} are not of whole {WIDTH}s, which are transformed together")
    h = matrix(seed, x.device)
    return (x.reshape(-1, WIDTH) @ (h.t() if inverse else h)).view(x.shape)
