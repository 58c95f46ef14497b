"""A keyed shuffle of `range(size)` without a table: entry `i` is computed, forwards and backwards.

A mixed-radix Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3
and 5): with `a = ceil(sqrt(size))` and `b = ceil(size / a)`, a number below `a * b` is a pair `(left, right)`,
`x = left * b + right`. Half-rounds alternately add a keyed hash of `right` to `left` modulo `a`, and of `left` to
`right` modulo `b`. Each is a bijection of `range(a * b)`, whatever the hash. A result that is `size` or more is
sent through again until one is below (cycle walking); since `a * b - size < a`, at most one in about `b` is.

The hash is the 64-bit finaliser of MurmurHash3 in the variant of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
It shuffles; it does not keep secrets.
"""

from __future__ import annotations

import hashlib
import math
import struct
from functools import lru_cache

import numpy as np

HALF_ROUNDS = 8
MAX_SIZE = 1 << 62

_MASK = (1 << 64) - 1
_C1, _C2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U1, _U2 = np.uint64(_C1), np.uint64(_C2)
_S30, _S27, _S32 = np.uint64(30), np.uint64(27), np.uint64(32)
# Blocks of this many elements stay in the processor's cache through all rounds.
_BLOCK = 1 << 14


@lru_cache(maxsize=1 << 12)
def round_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """The half-rounds' keys, 64 bits each: BLAKE2b of seed, epoch and source name."""
    # Numbers hold no separator and the name comes last, so no two triples give the same text.
    text = f"{seed}|{epoch}|{source}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * HALF_ROUNDS, person=b"window order v1").digest()
    return struct.unpack(f"<{HALF_ROUNDS}Q", digest)


def radices(size: int) -> tuple[int, int]:
    """`(a, b)` for a permutation of `range(size)`: `a = ceil(sqrt(size))`, `b = ceil(size / a)`.

    Raises:
        ValueError: `size` is not between 1 and 2^62.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"a permutation is of 1 to 2^62 things; asked for {size}")
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a)


class Permutation:
    """The order of `size` windows in one epoch of one source.

    Args:
        size: Number of things, 1 to 2^62.
        keys: From `round_keys`.

    Raises:
        ValueError: `size` is out of range.
    """

    def __init__(self, size: int, keys: tuple[int, ...]) -> None:
        self.size, self.keys = size, keys
        self._a, self._b = radices(size)

    def __call__(self, i: int) -> int:
        """Where position `i` of the epoch goes, in `range(size)`."""
        a, b, keys = self._a, self._b, self.keys
        while True:
            left, right = divmod(i, b)
            for k in range(0, HALF_ROUNDS, 2):
                z = (right + keys[k]) & _MASK
                z = ((z ^ (z >> 30)) * _C1) & _MASK
                z = ((z ^ (z >> 27)) * _C2) & _MASK
                left += ((z >> 32) * a) >> 32
                if left >= a:
                    left -= a
                z = (left + keys[k + 1]) & _MASK
                z = ((z ^ (z >> 30)) * _C1) & _MASK
                z = ((z ^ (z >> 27)) * _C2) & _MASK
                right += ((z >> 32) * b) >> 32
                if right >= b:
                    right -= b
            i = left * b + right
            if i < self.size:
                return i

    def inverse(self, window: int) -> int:
        """The position in the epoch at which `window` comes: `inverse(self(i)) == i`."""
        a, b, keys = self._a, self._b, self.keys
        while True:
            left, right = divmod(window, b)
            for k in range(HALF_ROUNDS - 2, -1, -2):
                right = (right - _scaled_hash(left, keys[k + 1], b)) % b
                left = (left - _scaled_hash(right, keys[k], a)) % a
            window = left * b + right
            if window < self.size:
                return window

    def many(self, positions: np.ndarray) -> np.ndarray:
        """`self(i)` of each position: [n] integers -> [n] int64."""
        n = len(positions)
        keys = np.broadcast_to(np.array(self.keys, np.uint64)[:, None], (HALF_ROUNDS, n))
        a, b, size = (np.broadcast_to(np.uint64(v), n) for v in (self._a, self._b, self.size))
        return permute(positions, size, a, b, keys)


def permute(
    positions: np.ndarray, size: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """One entry each of many permutations; element `i` equals `Permutation(size[i], keys[:, i])(positions[i])`.

    Args:
        positions: [n] integers, each below its `size`.
        size: [n] uint64.
        a: [n] uint64, the first of `radices(size)`.
        b: [n] uint64, the second.
        keys: [HALF_ROUNDS, n] uint64, from `round_keys`.

    Returns:
        [n] int64.
    """
    result = np.empty(len(positions), np.int64)
    for first in range(0, len(positions), _BLOCK):
        part = slice(first, first + _BLOCK)
        x = positions[part].astype(np.uint64)
        s, left, right, k = size[part], a[part], b[part], keys[:, part]
        x = _rounds(x, left, right, k)
        while len(outside := np.flatnonzero(x >= s)):
            x[outside] = _rounds(x[outside], left[outside], right[outside], k[:, outside])
        result[part] = x.astype(np.int64)
    return result


def _rounds(x: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    left = x // b
    right = x - left * b
    for k in range(0, HALF_ROUNDS, 2):
        left = _add(left, right, keys[k], a)
        right = _add(right, left, keys[k + 1], b)
    return left * b + right


def _add(to: np.ndarray, of: np.ndarray, key: np.ndarray, radix: np.ndarray) -> np.ndarray:
    z = of + key
    z ^= z >> _S30
    z *= _U1
    z ^= z >> _S27
    z *= _U2
    z >>= _S32
    # Scaling the upper 32 bits by the radix (at most 2^31) costs a multiplication where a modulo is a division.
    z *= radix
    z >>= _S32
    z += to
    # z < 2 * radix: below the radix, z - radix wraps to a huge number, so the minimum is z mod radix.
    return np.minimum(z, z - radix)


def _scaled_hash(of: int, key: int, radix: int) -> int:
    z = (of + key) & _MASK
    z = ((z ^ (z >> 30)) * _C1) & _MASK
    z = ((z ^ (z >> 27)) * _C2) & _MASK
    return ((z >> 32) * radix) >> 32
