"""Runs of tokens that a text has in common with training samples, and which samples those are.

Tokens are compared, not letters, since tokens are what was trained on: a text that is split at another place is found
by the tokens further in. Runs are looked up by a hash and then compared token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import ConfigError

LENGTH = 13  # tokens of a run
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token's bits are lost modulo 2**64
_SHOWN = 100  # samples that are listed of a text


@dataclass
class Found:
    """What of a text is in the training data.

    Attributes:
        runs: Runs that the text has.
        seen: Which of them were found, by place.
        samples: Numbers of the first samples that have one, in their order.
        times: Samples that have one.
    """

    runs: int
    seen: set[int] = field(default_factory=set)
    samples: list[int] = field(default_factory=list)
    times: int = 0

    @property
    def share(self) -> float:
        """Of the text's runs that were found; NaN where it is too short for one."""
        return len(self.seen) / self.runs if self.runs else float("nan")


def overlap(
    texts: Sequence[Sequence[int]],
    samples: Iterable[tuple[int, NDArray[np.integer]]],
    length: int = LENGTH,
) -> list[Found]:
    """Look for texts in training samples.

    Args:
        texts: Token ids of each.
        samples: Number and tokens [S + 1] of each sample.
        length: Tokens of a run.

    Returns:
        What was found of each text.

    Raises:
        ConfigError: `length` is not positive.
    """
    if length < 1:
        raise ConfigError("A run has one token at least.", where="length", found=length)
    ids = [np.asarray(text, np.int64) for text in texts]
    found = [Found(max(0, len(text) - length + 1)) for text in ids]
    hashes = [_hashes(text, length) for text in ids]
    known = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]))
    places: dict[int, list[tuple[int, int]]] = {}
    for number, of_text in enumerate(hashes):
        for place, value in enumerate(of_text.tolist()):
            places.setdefault(value, []).append((number, place))
    for sample, tokens in samples:
        window = np.asarray(tokens, np.int64)
        of_window = _hashes(window, length)
        here = set()
        for at in _hits(of_window, known).tolist():
            run = window[at : at + length]
            for number, place in places[int(of_window[at])]:
                if np.array_equal(ids[number][place : place + length], run):
                    found[number].seen.add(place)
                    here.add(number)
        for number in here:
            found[number].times += 1
            if len(found[number].samples) < _SHOWN:
                found[number].samples.append(sample)
    return found


def _hits(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Places of the values that are among the known ones, which are sorted: these are not gone through."""
    if not len(known):
        return np.empty(0, np.int64)
    nearest = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.flatnonzero(known[nearest] == values)


def _hashes(tokens: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Of every run of `length` tokens: uint64 [runs], a polynomial in `_FACTOR` modulo 2**64."""
    runs = len(tokens) - length + 1
    if runs < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(runs, np.uint64)
    values = (tokens + 1).astype(np.uint64)
    for offset in range(length):
        total = total * _FACTOR + values[offset : offset + runs]
    return total
