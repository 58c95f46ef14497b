"""Level 2: near-duplicates in all sources, by MinHash and locality-sensitive hashing, each pair confirmed exactly.

Signatures are cut into bands; documents that agree in all of a band are candidates (Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, chapter 3); of a crowd that agrees in one, those that single hashes tell apart. With 21
bands of 6, a pair of Jaccard similarity 0.8 is one with probability 0.998, where the report's 14 bands of 8 find
0.92. What the bands let through is then compared exactly, so a document is dropped only for one that stays and that
it is similar to, by at least the threshold: clusters do not chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field

from megatron_davinci.darwin.shingles import jaccard, shingles, signatures
from megatron_davinci.darwin.sketches import Arrays, names, save_sketch
from megatron_davinci.darwin.step import GlobalStep, StepParameters, Verdict
from megatron_davinci.darwin.words import rolling

_BATCH = 256  # documents whose signatures are computed at once
_NEIGHBOURS = 4  # earlier documents of a bucket that each is compared with, beside the bucket's first
_FEW = 64  # documents of crowded buckets that may have a hash in common before it tells nothing
_DEVIATIONS = 4  # of the signatures' estimate, below the threshold, down to which a pair is compared exactly


class MinhashDedup(GlobalStep):
    """Documents that say nearly the same; of several, the first in the recipe's order stays."""

    name = "minhash_dedup"
    level = 2
    version = 2
    about = "near-duplicates in any source, by MinHash and LSH, confirmed by their exact Jaccard similarity"

    class Parameters(StepParameters):
        """Parameters of `minhash_dedup`.

        Attributes:
            threshold: Jaccard similarity of the runs of words from which on two documents are duplicates.
            words: In a run.
            bands: Of the signature; more find more pairs, and cost more comparisons.
            rows: Hashes in a band; more let fewer pairs through.
        """

        threshold: float = Field(default=0.8, gt=0, le=1)
        words: int = Field(default=5, ge=1)
        bands: int = Field(default=21, ge=1)
        rows: int = Field(default=6, ge=1)

    parameters: Parameters

    def find_model(self) -> str:
        """The library with its version: another one may draw other hashes."""
        return f"rensa {version('rensa')}"

    def begin(self, folder: Path, task: int) -> None:
        """Begin a task's sketches."""
        self._path = folder / f"{task:05d}"
        self._ids: list[str] = []
        self._sets: list[NDArray[np.uint64]] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._kept: list[NDArray[np.uint32]] = []

    def sketch(self, document: Document) -> None:
        """Take the shingles."""
        self._add(document.id, shingles(document.text, self.parameters.words))

    def skip(self) -> None:
        """A place without shingles, which is similar to none."""
        self._add("", np.empty(0, np.uint64))

    def _add(self, identifier: str, found: NDArray[np.uint64]) -> None:
        self._ids.append(identifier)
        self._sets.append(found)
        if len(self._sets) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        hashes = self.parameters.bands * self.parameters.rows
        self._signatures.append(signatures(self._sets, hashes))
        # Half of each hash is enough to compare two sets of some thousands, and half to keep.
        self._kept += [np.unique(found.astype(np.uint32)) for found in self._sets]
        self._sets = []

    def finish(self) -> None:
        """Write signatures and shingles."""
        self._flush()
        hashes = self.parameters.bands * self.parameters.rows
        save_sketch(
            self._path,
            signatures=np.concatenate([np.empty((0, hashes), np.uint32), *self._signatures]),
            shingles=np.concatenate([np.empty(0, np.uint32), *self._kept]),
            shingle_ends=np.cumsum([0, *map(len, self._kept)], dtype=np.int64),
            **names(self._ids),
        )
        self._signatures, self._kept, self._ids = [], [], []

    def solve(self, folder: Path, tasks: Sequence[int]) -> Iterator[tuple[int, list[Verdict]]]:
        """Documents that are similar to an earlier one that stays; which one and how similar is noted."""
        sketches = [Arrays(folder / f"{task:05d}") for task in tasks]
        begins = np.cumsum([0, *(len(sketch["signatures"]) for sketch in sketches)])
        all_ = np.concatenate([sketch["signatures"] for sketch in sketches])
        filled = np.concatenate([np.diff(sketch["shingle_ends"]) > 0 for sketch in sketches])
        pairs = candidates(all_, filled, self.parameters.bands)
        pairs = likely(all_, pairs, self.parameters.threshold)

        def shingles_of(place: int) -> NDArray[np.uint32]:
            task = int(np.searchsorted(begins, place, side="right")) - 1
            first, end = sketches[task]["shingle_ends"][place - begins[task] : place - begins[task] + 2]
            return sketches[task]["shingles"][first:end]

        dropped: dict[int, tuple[int, float]] = {}
        for earlier, later in pairs.tolist():
            if earlier in dropped or later in dropped:
                continue
            similarity = jaccard(shingles_of(earlier), shingles_of(later))
            if similarity >= self.parameters.threshold:
                dropped[later] = (earlier, similarity)
        for task in range(len(tasks)):
            begin, end = int(begins[task]), int(begins[task + 1])
            verdicts = []
            for place in sorted(place for place in dropped if begin <= place < end):
                earlier, similarity = dropped[place]
                owner = int(np.searchsorted(begins, earlier, side="right")) - 1
                identifier = sketches[owner].name(earlier - int(begins[owner]))
                verdicts.append(
                    Verdict(
                        place - begin, "near_duplicate", {"of": identifier, "jaccard": round(similarity, 4)}
                    )
                )
            yield tasks[task], verdicts


def candidates(signatures_: NDArray[np.uint32], filled: NDArray[np.bool_], bands: int) -> NDArray[np.int64]:
    """Pairs of documents that agree in a band.

    Of a band that many agree in, as pages of one template do, not each pair is taken. What they have in common is
    that band's; those of them that are nearer to each other have hashes in common that few have.

    Args:
        signatures_: uint32 [documents, bands * rows].
        filled: Documents that have a shingle at all, bool [documents].
        bands: How many.

    Returns:
        Different pairs, the earlier document first, sorted by the later and then the earlier, int64 [pairs, 2].
    """
    count, rows = len(signatures_), signatures_.shape[1] // bands
    places = np.nonzero(filled)[0]
    crowded = np.zeros(count, np.bool_)
    found = [np.empty(0, np.int64)]
    for band in range(bands):
        columns = signatures_[places, band * rows : (band + 1) * rows].astype(np.uint64)
        keys = np.zeros(len(places), np.uint64)
        for column in columns.T:
            keys = rolling(np.stack([keys, column], 1).ravel(), 2)[::2]
        pairs, sizes = _in_buckets(keys, places, count, count)
        crowded[places[sizes > _NEIGHBOURS + 2]] = True
        found.append(pairs)
    places = np.nonzero(crowded)[0]
    for column in range(signatures_.shape[1]):
        found.append(_in_buckets(signatures_[places, column], places, count, _FEW)[0])
    together = np.unique(np.concatenate(found))
    return np.stack([together % max(1, count), together // max(1, count)], 1)


def _in_buckets(
    keys: NDArray[np.unsignedinteger], places: NDArray[np.int64], count: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of documents of one key: each with the first and with the `_NEIGHBOURS` before it.

    Args:
        keys: [n].
        places: The documents that have them, increasing, int64 [n].
        count: Documents in all.
        most: Keys that more documents have make no pair.

    Returns:
        Pairs as `earlier + later * count`, int64 [pairs]; and how many documents have the key of each, int64 [n].
    """
    order = np.argsort(keys, kind="stable")
    ordered, owners = keys[order], places[order]
    begins = np.arange(len(order))
    begins[1:][ordered[1:] == ordered[:-1]] = 0
    np.maximum.accumulate(begins, out=begins)
    sizes = np.bincount(begins, minlength=len(order))[begins]
    in_bucket = np.nonzero((begins != np.arange(len(order))) & (sizes <= most))[0]
    pairs = [owners[begins[in_bucket]] + owners[in_bucket] * count]
    for back in range(1, _NEIGHBOURS + 1):
        near = in_bucket[in_bucket - back > begins[in_bucket]]
        pairs.append(owners[near - back] + owners[near] * count)
    of_each = np.empty(len(order), np.int64)
    of_each[order] = sizes
    return np.unique(np.concatenate(pairs)), of_each


def likely(signatures_: NDArray[np.uint32], pairs: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """The pairs whose signatures do not speak against the threshold."""
    hashes = signatures_.shape[1]
    least = threshold - _DEVIATIONS * (threshold * (1 - threshold) / hashes) ** 0.5
    kept = [np.empty((0, 2), np.int64)]
    for begin in range(0, len(pairs), 65536):
        some = pairs[begin : begin + 65536]
        agree = (signatures_[some[:, 0]] == signatures_[some[:, 1]]).mean(axis=1)
        kept.append(some[agree >= least])
    return np.concatenate(kept)
