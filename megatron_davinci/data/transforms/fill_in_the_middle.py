"""Fill-in-the-middle: a document's middle comes last, so that it is predicted from both sides (arXiv:2207.14255).

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle". Documents are cut and rearranged where
they lie in the sample (their "context-level" way), at tokens and not at characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.transforms.draws import draws
from megatron_davinci.data.transforms.sample import Sample, documents

NAME = "fill in the middle"
Places = tuple[int, int]
"""Places in a sample: the first, and the one after the last."""


class Sentinels(NamedTuple):
    """Ids of the tokens that say which part follows."""

    prefix: int
    suffix: int
    middle: int


class FillInTheMiddle:
    """Rearranges some documents of a sample.

    Two cuts make a document prefix `p`, middle `m` and suffix `s`, any of which may be empty. With the sentinels
    `P`, `S` and `M` it becomes `P p S s M m` (PSM) or `P S s M p m` (SPM, the paper's second variant); its end stays
    the last token. A part of a document, at a sample's beginning or end, is treated like a document.

    A document without a token besides its end, and one that holds a sentinel already, stays as it is.

    Args:
        eod_ids: The token that ends a document, by source; other sources' samples stay as they are.
        sentinels: Not among the tokens that end documents.
        rate: Share of documents.
        spm_fraction: Share of SPM among them.
        seed: Of the run.
    """

    def __init__(
        self, eod_ids: Mapping[str, int], sentinels: Sentinels, rate: float, spm_fraction: float, seed: int
    ) -> None:
        self._eod_ids, self._sentinels = eod_ids, sentinels
        self._rate, self._spm_fraction, self._seed = rate, spm_fraction, seed

    @property
    def largest_id(self) -> int:
        """As `SampleTransform`."""
        return max(self._sentinels)

    def __call__(self, sample: Sample) -> Sample:
        """As `SampleTransform`."""
        eod_id = self._eod_ids.get(sample.source)
        if eod_id is None:
            return sample
        tokens = sample.tokens
        bounds = documents(tokens, eod_id)
        chance = draws(self._seed, NAME, sample.n, len(bounds) - 1)
        p, s, m = self._sentinels
        has_sentinel = (tokens == p) | (tokens == s) | (tokens == m)
        places: list[Places] = []
        kept = spm = psm = 0
        for number in np.flatnonzero(chance[:, 0] < self._rate).tolist():
            first, end = int(bounds[number]), int(bounds[number + 1])
            end -= int(tokens[end - 1]) == eod_id
            if first == end or has_sentinel[first:end].any():
                continue
            low, high = sorted(first + int(u * (end - first + 1)) for u in chance[number, 1:3].tolist())
            is_spm = bool(chance[number, 3] < self._spm_fraction)
            places += [(kept, first), *rearranged(first, low, high, end, len(tokens), spm=is_spm)]
            kept = end
            spm, psm = spm + is_spm, psm + (not is_spm)
        if not places:
            return sample
        places.append((kept, len(tokens)))
        with_sentinels = np.append(tokens, np.array(self._sentinels, tokens.dtype))
        # A sentinel is a label like any other: the model has to say when the middle is to come.
        weights = np.append(sample.weights, np.full(3, sample.full, np.uint8))
        said = f"{NAME} in {psm + spm:,} of {len(bounds) - 1:,} documents ({psm:,} PSM, {spm:,} SPM)"
        return sample._replace(
            tokens=np.concatenate([with_sentinels[first:end] for first, end in places]),
            weights=np.concatenate([weights[first:end] for first, end in places]),
            applied=(*sample.applied, said),
        )


def rearranged(first: int, low: int, high: int, end: int, sentinels: int, *, spm: bool) -> tuple[Places, ...]:
    """The places that a document's tokens come from, in their new order.

    Args:
        first: Its first place.
        low: Where its middle begins.
        high: Where its suffix begins.
        end: The place after its last token, without the end of the document.
        sentinels: Place of the three sentinels: prefix, suffix, middle.
        spm: Whether the suffix comes first.
    """
    p, s, m = ((sentinels + k, sentinels + k + 1) for k in range(3))
    prefix, middle, suffix = (first, low), (low, high), (high, end)
    return (p, s, suffix, m, prefix, middle) if spm else (p, prefix, s, suffix, m, middle)
