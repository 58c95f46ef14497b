"""The seam of sample transforms: what they are given, and what they give."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Sample(NamedTuple):
    """One sample on its way to the model.

    Attributes:
        n: Its global number.
        source: Name of its source.
        window: Its window in the source.
        tokens: [length] integers; at first the window, of sequence_length + 1.
        weights: [length] uint8, what each token weighs as a label. Weights travel with their tokens. The window's own
            first token weighs 0 wherever it goes: it is a label of the window before.
        full: What a label weighs that counts once.
        applied: What was done so far, a line each, for the reader.
    """

    n: int
    source: str
    window: int
    tokens: np.ndarray
    weights: np.ndarray
    full: int = 1
    applied: tuple[str, ...] = ()


class SampleTransform(Protocol):
    """Changes samples. What it does to one is a function of the sample and its number, and of nothing before it."""

    @property
    def largest_id(self) -> int | None:
        """The largest token id that it may add; None if it never changes tokens."""
        ...

    def __call__(self, sample: Sample) -> Sample:
        """The sample, changed.

        Args:
            sample: Is not written to. Its tokens are of a dtype that holds `largest_id`.

        Returns:
            The sample itself where nothing is to be done; its tokens may be more than before, and never fewer.
        """
        ...


def documents(tokens: np.ndarray, eod_id: int) -> np.ndarray:
    """Where the documents of a sample begin, and where the last one ends.

    Args:
        tokens: [length] integers.
        eod_id: The token that ends a document, and belongs to it.

    Returns:
        [documents + 1] int64, from 0 to `length`. The first and the last document may be parts.
    """
    ends = np.flatnonzero(tokens[:-1] == eod_id) + 1
    return np.concatenate(([0], ends, [len(tokens)]))
