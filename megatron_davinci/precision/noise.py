"""Uniform noise as a function: of a seed, of what it is for, and of a number's place in its whole tensor.

So stochastic rounding can be replayed, and is the same on every layout: a rank that holds a part of a tensor asks for
the noise of its rows and columns, which are counted over the whole tensor, and rows by the samples that they are of.

The hash mixes 32 bits by two multiplications (Wellons, 2018, `lowbias32` of hash-prospector, in the public domain).
It rounds; it keeps no secrets.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_LOW = (1 << 32) - 1


@lru_cache(maxsize=1 << 12)
def key(seed: int, layer: int, tensor: str) -> tuple[int, int]:
    """Two numbers of 32 bits.

    Args:
        seed: The run's.
        layer: The layer's number in the whole model.
        tensor: What is rounded.
    """
    digest = hashlib.blake2b(
        f"{seed}|{layer}|{tensor}".encode(), digest_size=8, person=b"rounding v1"
    ).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(
        digest[4:], "little", signed=True
    )


def uniform(keys: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
    """Uniform noise: multiples of 2^-24 from 0 to below 1.

    Args:
        keys: Of `key`.
        rows: [r] int64, the rows' numbers.
        columns: [c] int64, the columns' numbers.

    Returns:
        [r, c] fp32. A place's noise follows from its numbers and the keys alone.
    """
    by_row = _mix(_mix(_low(rows) ^ keys[0]) ^ _low(rows >> 32))
    by_column = _mix(_mix(_low(columns) ^ keys[1]) ^ _low(columns >> 32))
    mixed = _mix(by_row.unsqueeze(1) + by_column)
    return mixed.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def _low(numbers: Tensor) -> Tensor:
    """The lower 32 bits."""
    low = numbers & _LOW
    return torch.where(low > _LOW >> 1, low - (1 << 32), low).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    x = x ^ _shifted(x, 16)
    x.mul_(_FIRST)
    x ^= _shifted(x, 15)
    x.mul_(_SECOND)
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, and zeros come from the left."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)
