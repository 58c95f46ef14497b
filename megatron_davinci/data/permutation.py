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

from megatron_davinci.data.native import library

HALF_ROUNDS = 8
MAX_SIZE = 1 << 62

_MASK = (1 << 64) - 1
_C1, _C2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U1, _U2 = np.uint64(_C1), np.uint64(_C2)
_S30, _S27, _S32 = np.uint64(30), np.uint64(27), np.uint64(32)
BLOCK = 1 << 13
"""Work on this many elements at a time: their arrays stay in the processor's cache through all rounds."""


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
        keys = np.array([self.keys], np.uint64).T
        size, a, b = (np.array([value], np.int64) for value in (self.size, self._a, self._b))
        result = np.empty(len(positions), np.int64)
        for first in range(0, len(positions), BLOCK):
            part = slice(first, first + BLOCK)
            which = np.zeros(len(result[part]), np.int64)
            result[part] = permute(positions[part], which, size, a, b, keys)
        return result


def permute(
    positions: np.ndarray,
    which: np.ndarray,
    sizes: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    keys: np.ndarray,
) -> np.ndarray:
    """One entry each of several permutations: element `i` is entry `positions[i]` of permutation `which[i]`.

    Args:
        positions: [n] integers, each below the size of its permutation. Without the library fastest by at
            most `BLOCK` of them.
        which: [n] int64.
        sizes: [permutations] int64.
        a: [permutations] int64, the first of `radices(size)`.
        b: [permutations] int64, the second.
        keys: [HALF_ROUNDS, permutations] uint64, from `round_keys`.

    Returns:
        [n] int64.
    """
    native = library()
    form = permute_by_numpy if native is None else native.permute
    return form(positions, which, sizes, a, b, keys)


def permute_by_numpy(
    positions: np.ndarray,
    which: np.ndarray,
    sizes: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    keys: np.ndarray,
) -> np.ndarray:
    """`permute` where the library was not built: the same numbers."""
    network = a.astype(np.uint64), b.astype(np.uint64), keys
    x = _rounds(positions.astype(np.uint64), which, *network)
    limit = sizes.astype(np.uint64).take(which)
    while len(outside := np.flatnonzero(x >= limit)):
        x[outside] = _rounds(x[outside], which[outside], *network)
    return x.view(np.int64)


def _rounds(x: np.ndarray, which: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    a, b = a.take(which), b.take(which)
    left = x // b
    right = x - left * b
    # Two arrays serve all half-rounds: a fresh one for every operation would cost as much as the operation.
    z, scratch = np.empty_like(x), np.empty_like(x)
    for k in range(0, HALF_ROUNDS, 2):
        _add(left, right, keys[k].take(which, out=z), a, scratch)
        _add(right, left, keys[k + 1].take(which, out=z), b, scratch)
    left *= b
    left += right
    return left


def _add(to: np.ndarray, of: np.ndarray, z: np.ndarray, radix: np.ndarray, scratch: np.ndarray) -> None:
    """Add the hash of `of` under the key `z` to `to`, modulo `radix`; `z` and `scratch` are overwritten."""
    z += of
    z ^= np.right_shift(z, _S30, out=scratch)
    z *= _U1
    z ^= np.right_shift(z, _S27, out=scratch)
    z *= _U2
    z >>= _S32
    # Scaling the upper 32 bits by the radix (at most 2^31) costs a multiplication where a modulo is a division.
    z *= radix
    z >>= _S32
    z += to
    # z < 2 * radix: below the radix, z - radix wraps to a huge number, so the minimum is z mod radix.
    np.minimum(z, np.subtract(z, radix, out=scratch), out=to)


def _scaled_hash(of: int, key: int, radix: int) -> int:
    z = (of + key) & _MASK
    z = ((z ^ (z >> 30)) * _C1) & _MASK
    z = ((z ^ (z >> 27)) * _C2) & _MASK
    return ((z >> 32) * radix) >> 32
