"""Shingles of a text, their MinHash signature, and their exact Jaccard similarity.

A shingle is a run of words, case folded, without marks; numbers are words like others, so tables that differ in their
digits differ. (datatrove's default normalisation turns every digit into a zero, which makes one of them.) Signatures
are R-MinHash of rensa (https://github.com/beowolx/rensa), in Rust.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.darwin.words import plain_words_of, rolling, word_hashes

SEED = 1
# Scripts without blanks between words: each character is a word, or a sentence would be one.
_CHARACTERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED = re.compile(f"[{_CHARACTERS}]")
_WORD_OR_CHARACTER = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")


def words_for_runs(text: str) -> Sequence[str]:
    """The words of which runs are compared: case folded, without marks; characters where words have no blanks."""
    if text.isascii() or not _UNSPACED.search(text):
        return plain_words_of(text)
    return _WORD_OR_CHARACTER.findall(text.casefold())


def shingles(text: str, n: int) -> NDArray[np.uint64]:
    """The different runs of `n` words, as sorted 64-bit hashes; a shorter text is one run, one without words none."""
    words = words_for_runs(text)
    if not words:
        return np.empty(0, np.uint64)
    return np.unique(rolling(word_hashes(list(words)), min(n, len(words))))


def signatures(sets: Sequence[NDArray[np.uint64]], hashes: int) -> NDArray[np.uint32]:
    """MinHash signatures of sets of shingles, uint32 [sets, hashes]."""
    from rensa import RMinHash

    ends = np.cumsum([0, *map(len, sets)]).tolist()
    flat = np.concatenate([np.empty(0, np.uint64), *sets])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, hashes, SEED).to_rows()
    return np.array(rows, dtype=np.uint32).reshape(len(sets), hashes)


def jaccard(one: NDArray[np.unsignedinteger], other: NDArray[np.unsignedinteger]) -> float:
    """Of two sorted sets, what they share over what they have together; 0 for two empty ones."""
    if not len(one) or not len(other):
        return 0.0
    small, large = (one, other) if len(one) <= len(other) else (other, one)
    at = np.searchsorted(large, small)
    at[at == len(large)] = 0
    shared = int(np.count_nonzero(large[at] == small))
    return shared / (len(one) + len(other) - shared)
