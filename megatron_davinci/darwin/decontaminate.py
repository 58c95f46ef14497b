"""Level 2: documents that hold an evaluation's items are dropped whole, with the item that was found and its words.

The report drops by exact runs of 20 words, problem and solution joined; GPT-3 and others by runs of 13. Words are
case folded and stand without marks and white space, so an item is found however it is spaced, wrapped or capitalised.
The items are read from files: no evaluation harness is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field

from megatron_davinci.darwin.shingles import words_for_runs
from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters
from megatron_davinci.darwin.streams import Unreadable, lines, opened
from megatron_davinci.darwin.words import rolling, word_hashes
from megatron_davinci.errors import DataError
from megatron_davinci.files import file_digest

_LONGEST = 64_000_000


class Item(NamedTuple):
    """An item of an evaluation.

    Attributes:
        name: File and row.
        words: As they are compared.
    """

    name: str
    words: Sequence[str]


class Decontaminate(Step):
    """Documents that hold a run of words of an evaluation item."""

    name = "decontaminate"
    level = 2
    version = 2
    about = (
        "documents that hold a run of 13 or 20 words of an evaluation item; items are read from local files"
    )

    class Parameters(StepParameters):
        """Parameters of `decontaminate`.

        Attributes:
            files: Lines of JSON (plain or compressed) or Parquet, one item a record.
            fields: Whose text makes an item, joined in this order; None takes every field that holds text.
            words: In a run: 20 in the report, 13 elsewhere.
            min_words: An item shorter than a run is found as a whole, if it has at least so many words.
        """

        files: list[Path] = Field(min_length=1)
        fields: list[str] | None = None
        words: int = Field(default=13, ge=2)
        min_words: int = Field(default=8, ge=2)

    parameters: Parameters

    def files(self) -> dict[str, Any]:
        """Names and digests of the items' files, in place of their paths."""
        return {"files": [[path.name, file_digest(path)] for path in self.parameters.files]}

    def check(self) -> None:
        """Read every item once.

        Raises:
            DataError: A file cannot be read, or none of its items is long enough to be found.
        """
        for path in self.parameters.files:
            found = [item for item in read_items(path, self.parameters.fields) if self._runs(item)]
            if not found:
                raise DataError(
                    "A file of evaluation items has none that could be found.",
                    where=path,
                    expected=f"records with at least {self.parameters.min_words} words"
                    + (f" in {', '.join(self.parameters.fields)}" if self.parameters.fields else ""),
                    do="name the fields that hold the items' text by `fields`",
                )

    def _runs(self, item: Item) -> int:
        """Words in a run of this item; 0 if it is too short to be found."""
        count = len(item.words)
        if count >= self.parameters.words:
            return self.parameters.words
        return count if count >= self.parameters.min_words else 0

    def open(self) -> None:
        """Read the items into sorted tables of hashes, one for each length of run."""
        self._items = [
            item for path in self.parameters.files for item in read_items(path, self.parameters.fields)
        ]
        by_length: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        for number, item in enumerate(self._items):
            if n := self._runs(item):
                by_length.setdefault(n, []).append((rolling(word_hashes(list(item.words)), n), number))
        self._tables: list[tuple[int, NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]] = []
        for n, runs in sorted(by_length.items(), reverse=True):
            hashes = np.concatenate([each for each, _ in runs])
            owners = np.concatenate([np.full(len(each), number) for each, number in runs])
            places = np.concatenate([np.arange(len(each)) for each, _ in runs])
            hashes, first = np.unique(hashes, return_index=True)
            self._tables.append((n, hashes, owners[first], places[first]))

    def apply(self, document: Document) -> Outcome:
        """Look for each run of the document's words; what the hash says is confirmed by the words."""
        words = words_for_runs(document.text)
        hashes = word_hashes(list(words))
        for n, table, owners, places in self._tables:
            runs = rolling(hashes, n)
            at = np.searchsorted(table, runs)
            at[at == len(table)] = 0
            for place in np.nonzero(table[at] == runs)[0].tolist():
                item, there = self._items[owners[at[place]]], int(places[at[place]])
                found = tuple(words[place : place + n])
                if found == tuple(item.words[there : there + n]):
                    notes = {"item": item.name, "words": " ".join(found), "at_word": place}
                    return Outcome(drop=f"evaluation_item_{self.parameters.words}_words", notes=notes)
        return KEEP


def read_items(path: Path, fields: Sequence[str] | None) -> Iterator[Item]:
    """The items of a file.

    Raises:
        DataError: It cannot be read, or a line is no JSON object.
    """
    for row, record in enumerate(_records(path)):
        names = fields if fields is not None else list(record)
        text = "\n".join(part for name in names for part in _texts(record.get(name)))
        yield Item(f"{path.name}#{row}", tuple(words_for_runs(text)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
            return
        with opened(path) as file:
            for number, line in enumerate(lines(file, _LONGEST), start=1):
                if line.content is not None and line.content.strip():
                    record = json.loads(line.content)
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is no object")
                    yield record
    except (Unreadable, OSError, ValueError) as error:
        raise DataError(
            "A file of evaluation items cannot be read.",
            where=path,
            found=error,
            expected="lines of JSON, one object an item, or Parquet",
        ) from error
