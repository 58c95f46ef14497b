"""Level 2: lines and paragraphs that stand in many documents, taken out over all sources, after CCNet (1911.00359).

datatrove's step for the same job looks at runs of three sentences, needs spaCy or NLTK to part them, and drops
documents of few sentences or words without saying so. Here a piece is what the text itself parts; which pieces went,
and where the first of them stood before, is in the document's history; a document of which too little is left is
dropped by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field

from megatron_davinci.darwin.provenance import Entry
from megatron_davinci.darwin.sketches import KEY, Arrays, first_of_each, names, save_sketch
from megatron_davinci.darwin.step import GlobalStep, Outcome, StepParameters, Verdict

_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_LINE = re.compile(r"\n")
_NO_KEY = bytes(16)


class DedupPieces(GlobalStep):
    """Lines or paragraphs that were there before."""

    name = "dedup_pieces"
    level = 2
    edits = True
    about = (
        "lines or paragraphs that stand in several documents of any source, taken out of all but the first"
    )

    class Parameters(StepParameters):
        """Parameters of `dedup_pieces`.

        Attributes:
            unit: What a piece is: a `paragraph` (blank lines part them), or a `line`.
            min_characters: Shorter pieces stay: headings, brackets and empty lines repeat by right.
            occurrences: From how many times on, all documents together, a piece counts as repeated.
            keep_first: Leave the first in the recipe's order; otherwise all go.
            min_left: A document of which fewer characters are left is dropped.
        """

        unit: Literal["paragraph", "line"] = "paragraph"
        min_characters: int = Field(default=50, ge=1)
        occurrences: int = Field(default=2, ge=2)
        keep_first: bool = True
        min_left: int = Field(default=1, ge=1)

    parameters: Parameters

    def begin(self, folder: Path, task: int) -> None:
        """Begin a task's keys."""
        self._path = folder / f"{task:05d}"
        self._keys, self._ends, self._ids = bytearray(), [0], list[str]()

    def sketch(self, document: Document) -> None:
        """Take the key of each piece."""
        for piece in pieces(document.text, self.parameters.unit):
            words = " ".join(piece.split())
            short = len(words) < self.parameters.min_characters
            self._keys += _NO_KEY if short else xxhash.xxh3_128_digest(words.encode("utf-8", "surrogatepass"))
        self._end(document.id)

    def skip(self) -> None:
        """A document without pieces."""
        self._end("")

    def _end(self, identifier: str) -> None:
        self._ends.append(len(self._keys) // 16)
        self._ids.append(identifier)

    def finish(self) -> None:
        """Write them."""
        save_sketch(
            self._path,
            keys=np.frombuffer(bytes(self._keys), KEY),
            ends=np.array(self._ends, np.int64),
            **names(self._ids),
        )

    def solve(self, folder: Path, tasks: Sequence[int]) -> Iterator[tuple[int, list[Verdict]]]:
        """Of each document, which pieces go, as runs of their numbers, and where the first of these stood before."""
        sketches = [Arrays(folder / f"{task:05d}") for task in tasks]
        keys = np.concatenate([np.empty(0, KEY), *(sketch["keys"] for sketch in sketches)])
        begins = np.cumsum([0, *(len(sketch["keys"]) for sketch in sketches)])
        first = first_of_each(keys)
        times = np.bincount(first, minlength=len(keys))[first]
        goes = (times >= self.parameters.occurrences) & (
            (first != np.arange(len(keys))) | (not self.parameters.keep_first)
        )

        def owner_of(piece: int) -> str:
            task = int(np.searchsorted(begins, piece, side="right")) - 1
            within = piece - int(begins[task])
            return sketches[task].name(int(np.searchsorted(sketches[task]["ends"], within, side="right")) - 1)

        for task, sketch, begin, end in zip(tasks, sketches, begins[:-1], begins[1:], strict=True):
            verdicts = []
            gone = np.nonzero(goes[begin:end])[0]
            documents = np.searchsorted(sketch["ends"], gone, side="right") - 1
            for place in np.unique(documents):
                own = gone[
                    np.searchsorted(documents, place) : np.searchsorted(documents, place, side="right")
                ]
                removed = runs(own - sketch["ends"][place])
                notes = {"removed": removed, "of": owner_of(int(first[begin + own[0]]))}
                verdicts.append(Verdict(int(place), "", notes))
            yield task, verdicts

    def carry_out(self, document: Document, reason: str, notes: dict[str, Any]) -> Outcome:
        """Take the pieces out."""
        own = pieces(document.text, self.parameters.unit)
        for begin, end in reversed(notes["removed"]):
            del own[begin:end]
        text = "".join(own).rstrip("\n")
        counts = {"removed_characters": len(document.text) - len(text)}
        if len(text.strip()) < self.parameters.min_left:
            return Outcome(drop="nothing_left", notes=notes, counts=counts)
        return Outcome(text=text, notes=notes, counts=counts)

    def repeat(self, document: Document, entry: Entry) -> Outcome:
        """Take the same pieces out again: which these were depends on all documents, and stands in the history."""
        return self.carry_out(document, "", entry["notes"])


def pieces(text: str, unit: str) -> list[str]:
    """A text's lines or paragraphs, each with the blanks that follow it: joined, they are the text."""
    found, begin = [], 0
    for gap in (_LINE if unit == "line" else _PARAGRAPH).finditer(text):
        found.append(text[begin : gap.end()])
        begin = gap.end()
    return [*found, text[begin:]]


def runs(numbers: NDArray[np.int64]) -> list[list[int]]:
    """Ascending numbers as runs, `[first, one past the last]` each."""
    breaks = np.nonzero(np.diff(numbers) != 1)[0] + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, breaks)]
