"""Documents that begin with where they are from: metadata conditioning, then cool-down (MeCo, arXiv:2501.01956).

The text before a document is seen and not learnt. A stage without it is the cool-down: the model then needs none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from megatron_davinci.data.transforms.draws import draws
from megatron_davinci.data.transforms.sample import Sample, documents

NAME = "metadata prefix"


class MetadataPrefix:
    """Puts a source's metadata before each document that begins in a sample.

    A document that goes on from the window before has had its prefix there.

    Args:
        prefixes: Token ids of each source's metadata; other sources' samples stay as they are.
        eod_ids: The token that ends a document, by source.
        fraction: Share of samples that get it.
        seed: Of the run.
        begins: Whether a window's first token begins a document: (source, window) -> bool.
    """

    def __init__(
        self,
        prefixes: Mapping[str, np.ndarray],
        eod_ids: Mapping[str, int],
        fraction: float,
        seed: int,
        begins: Callable[[str, int], bool],
    ) -> None:
        self._prefixes, self._eod_ids = prefixes, eod_ids
        self._fraction, self._seed, self._begins = fraction, seed, begins

    @property
    def largest_id(self) -> int:
        """As `SampleTransform`."""
        return max(int(prefix.max()) for prefix in self._prefixes.values())

    def __call__(self, sample: Sample) -> Sample:
        """As `SampleTransform`."""
        prefix = self._prefixes.get(sample.source)
        if prefix is None or draws(self._seed, NAME, sample.n, 1)[0, 0] >= self._fraction:
            return sample
        # The first begins at 0, and may be one that goes on.
        begins = documents(sample.tokens, self._eod_ids[sample.source])[:-1]
        if not self._begins(sample.source, sample.window):
            begins = begins[1:]
        if not len(begins):
            return sample
        bounds = [0, *begins.tolist(), len(sample.tokens)]
        added, no_weight = prefix.astype(sample.tokens.dtype), np.zeros(len(prefix), np.uint8)
        said = f"{NAME} of {len(prefix):,} tokens before {len(begins):,} documents"
        return sample._replace(
            tokens=_between(sample.tokens, bounds, added),
            weights=_between(sample.weights, bounds, no_weight),
            applied=(*sample.applied, said),
        )


def _between(array: np.ndarray, bounds: list[int], added: np.ndarray) -> np.ndarray:
    """The parts of an array that bounds make, with something added between each and the next."""
    parts = [array[bounds[0] : bounds[1]]]
    for first, end in itertools.pairwise(bounds[1:]):
        parts += [added, array[first:end]]
    return np.concatenate(parts)
