"""Level 2: exact duplicates, by a 128-bit hash of the text, across all sources; and identifiers given twice."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.sketches import KEY, Arrays, first_of_each, names, save_sketch
from megatron_davinci.darwin.step import GlobalStep, StepParameters, Verdict


class KeyedStep(GlobalStep):
    """Of all documents with one key, the first stays."""

    reason: str

    def begin(self, folder: Path, task: int) -> None:
        """Begin a task's keys."""
        self._path = folder / f"{task:05d}"
        self._keys, self._ids = bytearray(), list[str]()

    def sketch(self, document: Document) -> None:
        """Take the key."""
        self._keys += self.key(document)
        self._ids.append(document.id)

    def skip(self) -> None:
        """A place without a key: zeros, which no digest is."""
        self._keys += bytes(16)
        self._ids.append("")

    def key(self, document: Document) -> bytes:
        """16 bytes."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write keys and identifiers."""
        save_sketch(self._path, keys=np.frombuffer(bytes(self._keys), KEY), **names(self._ids))

    def solve(self, folder: Path, tasks: Sequence[int]) -> Iterator[tuple[int, list[Verdict]]]:
        """All but the first of each key; who that is goes into the history of the others."""
        sketches = [Arrays(folder / f"{task:05d}") for task in tasks]
        keys = np.concatenate([np.empty(0, KEY), *(sketch["keys"] for sketch in sketches)])
        begins = np.cumsum([0, *(len(sketch["keys"]) for sketch in sketches)])
        kept = first_of_each(keys)
        for task, begin, end in zip(tasks, begins[:-1], begins[1:], strict=True):
            verdicts = []
            for index in np.nonzero(kept[begin:end] != np.arange(begin, end))[0]:
                owner = int(np.searchsorted(begins, kept[begin + index], side="right")) - 1
                identifier = sketches[owner].name(int(kept[begin + index] - begins[owner]))
                verdicts.append(Verdict(int(index), self.reason, {"of": identifier}))
            yield task, verdicts


class ExactDedup(KeyedStep):
    """Documents with the same text; of several, the first in the recipe's order stays."""

    name = "exact_dedup"
    level = 2
    about = "documents whose text was there before, in any source; the first stays"
    reason = "exact_duplicate"

    class Parameters(StepParameters):
        """Parameters of `exact_dedup`.

        Attributes:
            ignore: What two texts may differ in: `nothing`, white `space`, or `case` too.
        """

        ignore: str = Field(default="space", pattern="^(nothing|space|case)$")

    parameters: Parameters

    def key(self, document: Document) -> bytes:
        """The hash of what the texts must have in common."""
        text = document.text
        if self.parameters.ignore != "nothing":
            text = " ".join(text.split())
        if self.parameters.ignore == "case":
            text = unicodedata.normalize("NFKC", text).casefold()
        return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


class UniqueIds(KeyedStep):
    """Documents whose identifier was there before: nobody could tell whose history is whose."""

    name = "unique_ids"
    level = 0
    about = "identifiers that were there before"
    reason = "duplicate_id"
    quarantines = True

    def key(self, document: Document) -> bytes:
        """The hash of the identifier."""
        return xxhash.xxh3_128_digest(document.id.encode("utf-8", "surrogatepass"))
