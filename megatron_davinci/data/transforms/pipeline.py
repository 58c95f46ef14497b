"""The transforms of one stage, in their order, over the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.transforms.sample import Sample, SampleTransform

_DTYPES = (np.dtype(np.uint16), np.dtype(np.int32), np.dtype(np.int64))


class Transformed(NamedTuple):
    """Samples as the model sees them.

    Attributes:
        tokens: [n, sequence_length + 1]: as they were read if no transform changes tokens, else an array of its own,
            of the narrowest dtype that holds theirs and what transforms add.
        weights: [n, sequence_length] uint8, what each label weighs in the loss.
        cut: How many tokens ran past the end, in all samples together.
    """

    tokens: np.ndarray
    weights: np.ndarray
    cut: int


class SampleTransforms:
    """What a stage does to its samples.

    Args:
        transforms: In the order in which they are applied.

    Attributes:
        largest_id: The largest token id that they may add; None if none changes tokens.
    """

    def __init__(self, transforms: Sequence[SampleTransform]) -> None:
        self._transforms = tuple(transforms)
        ids = [transform.largest_id for transform in transforms if transform.largest_id is not None]
        self.largest_id: int | None = max(ids, default=None)

    @property
    def lengthens(self) -> bool:
        """Whether samples may become longer, so that tokens are cut."""
        return self.largest_id is not None

    def dtype(self, read: np.dtype) -> np.dtype:
        """The dtype of samples that were read as another."""
        if self.largest_id is None or self.largest_id <= np.iinfo(read).max:
            return read
        return next(wide for wide in _DTYPES if self.largest_id <= np.iinfo(wide).max)

    def apply(
        self, curriculum: Curriculum, ns: np.ndarray, tokens: np.ndarray, loss_mask: np.ndarray | None
    ) -> Transformed:
        """Transform samples. What becomes of one depends on its number alone, and not on the others.

        Args:
            curriculum: Says which window each sample is.
            ns: [n] integers.
            tokens: [n, sequence_length + 1], as read.
            loss_mask: [n, sequence_length] uint8, 1 where a label carries loss; None where all do.

        Raises:
            DataError: The storage that says whether a window begins with a document is damaged.
            EnvironmentProblem: It cannot be read.
        """
        located = curriculum.locate_many(ns)
        length = tokens.shape[1]
        weights = np.empty((len(tokens), length - 1), np.uint8)
        changed = tokens
        if self.lengthens:
            changed = np.empty(tokens.shape, self.dtype(tokens.dtype))
            np.copyto(changed, tokens, casting="safe")
        cut = 0
        where = zip(located.source.tolist(), located.window.tolist(), strict=True)
        for row, (n, (source, window)) in enumerate(zip(np.asarray(ns).tolist(), where, strict=True)):
            mask = None if loss_mask is None else loss_mask[row]
            found = self.one(n, curriculum.sources[source], window, changed[row], mask)
            if self.lengthens:
                cut += len(found.tokens) - length
                changed[row] = found.tokens[:length]
            weights[row] = found.weights[1:length]
        return Transformed(changed, weights, cut)

    def one(
        self, n: int, source: str, window: int, tokens: np.ndarray, loss_mask: np.ndarray | None
    ) -> Sample:
        """Transform one sample, and cut nothing.

        Args:
            n: Its number.
            source: Name of its source.
            window: Its window.
            tokens: [sequence_length + 1], of a dtype that holds `largest_id`.
            loss_mask: [sequence_length] uint8; None where all labels carry loss.
        """
        weights = np.ones(len(tokens), np.uint8)
        weights[0] = 0
        if loss_mask is not None:
            weights[1:] = loss_mask
        sample = Sample(n, source, window, tokens, weights)
        for transform in self._transforms:
            sample = transform(sample)
        return sample
