"""Which passages of other documents a document is about: by BM25, over all documents of the corpus.

Each document is cut into passages, and asks with its own rarest words for the passages of others that have them
(BM25: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, equation 3.15). What is found travels with
the document, text and identifier, so that whoever uses it later can be held against it.

The words of all passages are held in memory while this is solved: some 16 bytes for each different word of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from megatron_davinci.darwin import facts_of
from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.sketches import Arrays, names, save
from megatron_davinci.darwin.step import GlobalStep, Outcome, StepParameters, Verdict

_BUCKETS = 1 << 22  # that words are hashed into
_K1, _B = 1.5, 0.75
_ASKED = 48  # words that a document asks with
_SHARED = 3  # of which a passage must have
_AT_ONCE = 256  # documents


class Relate(GlobalStep):
    """Passages of other documents that have to do with a document, for `contextualise`."""

    name = "relate"
    level = 2
    about = "finds passages of other documents that share a document's rare words, by BM25"

    class Parameters(StepParameters):
        """Parameters of `relate`.

        Attributes:
            passages: That a document gets at most, each of another document.
            size: Most characters of one.
        """

        passages: int = Field(default=3, gt=0)
        size: int = Field(default=800, gt=0)

    parameters: Parameters

    def begin(self, folder: Path, task: int) -> None:
        """Begin a task's passages."""
        self._path = folder / f"{task:05d}"
        self._texts: list[str] = []
        self._ids: list[str] = []
        self._places: list[int] = []
        self._terms: list[NDArray[np.uint32]] = []
        self._counts: list[NDArray[np.uint16]] = []

    def sketch(self, document: Document) -> None:
        """Cut into passages, and count their words."""
        place = len(self._ids)
        self._ids.append(document.id)
        for chunk in cut(document.text, self.parameters.size):
            if chunk.text:
                counts = Counter(_bucket(word) for word in facts_of.words(chunk.text) if len(word) > 3)
                self._texts.append(chunk.text)
                self._places.append(place)
                self._terms.append(np.fromiter(counts, np.uint32, len(counts)))
                self._counts.append(
                    np.minimum(np.fromiter(counts.values(), np.int64, len(counts)), 65535).astype(np.uint16)
                )

    def skip(self) -> None:
        """A document that neither asks nor is asked for."""
        self._ids.append("")

    def finish(self) -> None:
        """Write the passages, their words and whose they are."""
        ends = np.cumsum([0, *map(len, self._terms)], dtype=np.int64)
        empty: NDArray[Any] = np.empty(0, np.uint32)
        save(
            self._path,
            terms=np.concatenate([empty, *self._terms]),
            counts=np.concatenate([empty.astype(np.uint16), *self._counts]),
            ends=ends,
            places=np.array(self._places, np.int64),
            **names(self._texts),
        )
        save(self._path.with_name(f"{self._path.name}.ids"), **names(self._ids))

    def solve(self, folder: Path, tasks: Sequence[int]) -> Iterator[tuple[int, list[Verdict]]]:
        """For each document the passages of others that fit it best."""
        found = [Arrays(folder / f"{task:05d}") for task in tasks]
        ids = [Arrays(folder / f"{task:05d}.ids") for task in tasks]
        sizes = [len(each["name_ends"]) - 1 for each in ids]
        begins = np.cumsum([0, *sizes])
        owners = np.concatenate(
            [
                np.empty(0, np.int64),
                *(each["places"] + begin for each, begin in zip(found, begins, strict=False)),
            ]
        )
        firsts = np.cumsum([0, *(len(each["places"]) for each in found)])

        def text(passage: int) -> str:
            task = int(np.searchsorted(firsts, passage, side="right")) - 1
            return found[task].name(int(passage - firsts[task]))

        def identifier(document: int) -> str:
            task = int(np.searchsorted(begins, document, side="right")) - 1
            return ids[task].name(int(document - begins[task]))

        weights, tf, idf = _weights(found)
        for task, begin, end in zip(tasks, begins[:-1], begins[1:], strict=True):
            verdicts = []
            for first in range(int(begin), int(end), _AT_ONCE):
                last = min(first + _AT_ONCE, int(end))
                rows = _asked(tf, idf, owners, first, last)
                for document in range(first, last):
                    words = rows.indices[slice(*rows.indptr[document - first : document - first + 2])]
                    chosen = self._best(words, document, owners, weights) if len(words) else []
                    related = [
                        {
                            "id": identifier(int(owners[passage])),
                            "text": text(passage),
                            "score": round(score, 3),
                        }
                        for passage, score in chosen
                    ]
                    if related:
                        verdicts.append(Verdict(document - int(begin), "", {"related": related}))
            yield task, verdicts

    def _best(
        self, asked: Any, document: int, owners: NDArray[np.int64], weights: Any
    ) -> list[tuple[int, float]]:
        """The best passage of each of the best other documents, with its score.

        Args:
            asked: The words that the document asks with.
            document: Its number.
            owners: By passage, the number of its document.
            weights: [passages, words], by column.
        """
        terms = weights[:, asked]
        passages, places = np.unique(terms.indices, return_inverse=True)
        scores = np.bincount(places, terms.data, minlength=len(passages))
        shared = np.bincount(places, minlength=len(passages))
        fits = (shared >= min(_SHARED, len(asked))) & (owners[passages] != document)
        best: dict[int, tuple[int, float]] = {}
        for place in np.lexsort((passages, -scores)):
            if fits[place] and (owner := int(owners[passages[place]])) not in best:
                best[owner] = (int(passages[place]), float(scores[place]))
                if len(best) == self.parameters.passages:
                    break
        return list(best.values())

    def carry_out(self, document: Document, reason: str, notes: dict[str, Any]) -> Outcome:
        """Give the document what was found, but for what it says itself."""
        related = [
            {"id": each["id"], "text": each["text"]}
            for each in notes["related"]
            if each["text"] not in document.text
        ]
        document.metadata["related"] = related
        said = {"related": [each["id"] for each in related]}
        return Outcome(notes=said, counts={"documents/with related passages": int(bool(related))})


def _bucket(word: str) -> int:
    word = word.removesuffix("s") if len(word) > 4 and not word.endswith("ss") else word
    return xxhash.xxh32_intdigest(word.encode()) % _BUCKETS


def _weights(found: Sequence[Arrays]) -> tuple[Any, Any, NDArray[np.float64]]:
    """BM25's weight of each word in each passage (CSC), how often it is there (CSR), and each word's rarity."""
    columns = np.concatenate([np.empty(0, np.uint32), *(each["terms"] for each in found)]).astype(np.int64)
    counts = np.concatenate([np.empty(0, np.uint16), *(each["counts"] for each in found)]).astype(np.float64)
    lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(each["ends"]) for each in found)])
    pointer = np.concatenate([[0], np.cumsum(lengths)])
    tf = sparse.csr_matrix((counts, columns, pointer), shape=(len(lengths), _BUCKETS))
    frequency = np.bincount(columns, minlength=_BUCKETS)
    idf = np.log1p((len(lengths) - frequency + 0.5) / (frequency + 0.5))
    words = np.asarray(tf.sum(axis=1)).ravel()
    norm = _K1 * (1 - _B + _B * words / max(1.0, words.mean() if len(words) else 1.0))
    values = idf[columns] * counts * (_K1 + 1) / (counts + np.repeat(norm, lengths))
    return sparse.csr_matrix((values, columns, pointer), shape=tf.shape).tocsc(), tf, idf


def _asked(tf: Any, idf: NDArray[np.float64], owners: NDArray[np.int64], first: int, last: int) -> Any:
    """The words that documents ask with: those of theirs that are rarest and most frequent in them; CSR."""
    begin, end = np.searchsorted(owners, [first, last])
    own = tf[begin:end]
    member = sparse.csr_matrix(
        (np.ones(end - begin), (owners[begin:end] - first, np.arange(end - begin))),
        shape=(last - first, end - begin),
    )
    rows = (member @ own).tocsr()
    for row in range(rows.shape[0]):
        part = slice(rows.indptr[row], rows.indptr[row + 1])
        value = np.log1p(rows.data[part]) * idf[rows.indices[part]]
        if len(value) > _ASKED:
            least = np.partition(value, -_ASKED)[-_ASKED]
            rows.data[part][value < least] = 0.0
    rows.eliminate_zeros()
    return rows
