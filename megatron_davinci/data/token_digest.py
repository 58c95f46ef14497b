"""A digest of what a global batch was made of: the same whoever reads which part of it."""

from __future__ import annotations

import hashlib

import numpy as np

_WHOLE = 1 << 64


def digest_parts(numbers: np.ndarray, tokens: np.ndarray) -> tuple[int, int]:
    """Two numbers below 2^64 for some samples; those of a global batch are the sums over its parts, modulo 2^64.

    Each sample gives the BLAKE2b digest (16 bytes) of its number, as 8 bytes, and its tokens, as 4 bytes each, all
    little-endian. Addition knows no order, so the sum is that of the batch however it is shared out. It finds what
    went wrong; it is no protection from somebody who looks for samples of the same sum.

    Args:
        numbers: [n] integers, the samples' numbers.
        tokens: [n, sequence_length + 1] integers below 2^31.
    """
    first = second = 0
    rows = np.ascontiguousarray(tokens, dtype="<i4")
    for number, row in zip(np.asarray(numbers, dtype="<i8"), rows, strict=True):
        digest = hashlib.blake2b(number.tobytes(), digest_size=16)
        digest.update(row.data)
        first += int.from_bytes(digest.digest()[:8], "little")
        second += int.from_bytes(digest.digest()[8:], "little")
    return first % _WHOLE, second % _WHOLE


def digest_text(first: int, second: int) -> str:
    """The digest as metrics have it: 32 hex digits."""
    return f"{first % _WHOLE:016x}{second % _WHOLE:016x}"


def token_digest(numbers: np.ndarray, tokens: np.ndarray) -> str:
    """The digest of a whole global batch, to compare with `token_digest` in `metrics.jsonl`.

    Args:
        numbers: [n] integers, the samples' numbers, in any order.
        tokens: [n, sequence_length + 1] integers, as the model sees them.
    """
    return digest_text(*digest_parts(numbers, tokens))
