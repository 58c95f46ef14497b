"""Chance that is a function of the sample number: no generator has a state, so nothing of it needs saving.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a keyed function of a counter. The
key is of the run's seed and of what is drawn for; the counter is the sample number and the number of the draw.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

_UNIT = 2.0**-53


@lru_cache(maxsize=64)
def _key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=16, person=b"sample draw v1").digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def draws(seed: int, name: str, n: int, count: int) -> np.ndarray:
    """Four numbers for each of `count` things in a sample. Thing `k` gets the same however many there are.

    Args:
        seed: Of the run.
        name: What they are drawn for.
        n: The global sample number.
        count: How many things.

    Returns:
        [count, 4] float64, uniform in [0, 1).
    """
    philox = np.random.Philox(counter=[0, 0, n, 0], key=list(_key(seed, name)))
    raw = philox.random_raw(4 * count).reshape(count, 4)
    return (raw >> np.uint64(11)) * _UNIT
