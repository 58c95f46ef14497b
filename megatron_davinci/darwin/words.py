"""Words, lines and their n-grams, computed once for a text however many rules ask."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
from numpy.typing import NDArray

_WORD = re.compile(r"\w+|[^\w\s]+")
_LETTERS = re.compile(r"[^\W_]+")  # an underscore is a blank to be filled in, or a mark of Markdown
PUNCTUATION = frozenset(PUNCTUATION_SET)
TERMINAL = frozenset(TERMINAL_PUNCTUATION)  # single characters
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=2)
def words_of(text: str) -> tuple[str, ...]:
    """Runs of letters and digits, and runs of other marks, in order; white space parts them."""
    return tuple(_WORD.findall(text))


@lru_cache(maxsize=2)
def plain_words_of(text: str) -> tuple[str, ...]:
    """Runs of letters and digits, case folded, without marks: what two spellings of a text have in common."""
    return tuple(_LETTERS.findall(text.casefold()))


@lru_cache(maxsize=2)
def lines_of(text: str) -> tuple[str, ...]:
    """The lines that are not blank, stripped on the right."""
    return tuple(stripped for line in text.split("\n") if (stripped := line.rstrip()))


def rolling(values: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each run of `n` values.

    Args:
        values: Hashes of words, uint64 [w].
        n: Words in a run.

    Returns:
        uint64 [max(0, w - n + 1)].
    """
    count = len(values) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for offset in range(n):
        mixed = mixed * _MULTIPLIER + values[offset : offset + count]
        mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


_hashes: dict[str, int] = {}
_MOST_HASHES = 1 << 19


def word_hashes(words: tuple[str, ...] | list[str]) -> NDArray[np.uint64]:
    """XXH3 of each word, uint64 [w]; of words seen before, from memory."""
    import xxhash

    known, digest = _hashes, xxhash.xxh3_64_intdigest
    if len(known) > _MOST_HASHES:
        known.clear()
    for word in set(words).difference(known):
        known[word] = digest(word.encode("utf-8", "surrogatepass"))
    return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))
