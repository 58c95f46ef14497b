"""What a window is, byte by byte: its shard, its documents, its loss mask, its text."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.documents import Document, DocumentIndex
from megatron_davinci.data.indexed import bin_path, idx_path
from megatron_davinci.data.places import Place
from megatron_davinci.data.source import Source
from megatron_davinci.errors import ConfigError

_CONTROLS = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"  # format characters that Persian, Hindi and emoji are written with


class Piece(NamedTuple):
    """The part of a document that lies in a window.

    Attributes:
        document: The document, in its shard.
        first: Its first position in the window.
        end: The position after its last.
    """

    document: Document
    first: int
    end: int


@dataclass(frozen=True)
class WindowFacts:
    """A window, read.

    Attributes:
        source: Name of its source.
        window: Its number in the source.
        shard: Number of its shard.
        prefix: The shard, without `.bin` or `.idx`.
        first_token: Its first token in the shard.
        tokens: [sequence_length + 1] of the source's dtype.
        pieces: The documents that it touches, in order; empty ones have nothing to touch.
        loss_labels: How many of its labels carry loss; None where the source has no mask and all do.
    """

    source: str
    window: int
    shard: int
    prefix: Place
    first_token: int
    tokens: np.ndarray
    pieces: tuple[Piece, ...]
    loss_labels: int | None

    @property
    def bin(self) -> Place:
        """The file that holds its tokens."""
        return bin_path(self.prefix)

    @property
    def idx(self) -> Place:
        """The index that knows its documents."""
        return idx_path(self.prefix)

    @property
    def token_range(self) -> tuple[int, int]:
        """Its tokens in the shard, the end excluded."""
        return self.first_token, self.first_token + len(self.tokens)

    @property
    def byte_range(self) -> tuple[int, int]:
        """Its bytes in `bin`, the end excluded."""
        first, end = self.token_range
        return first * self.tokens.itemsize, end * self.tokens.itemsize


class DocumentWindows(NamedTuple):
    """Where a document of a source is seen.

    Attributes:
        shard: Number of the shard.
        document: The document, in its shard.
        windows: The source's windows that hold any of its tokens; none for an empty document, and for one in the
            shard's last tokens, which are in no window.
    """

    shard: int
    document: Document
    windows: range


class Explainer:
    """Says what windows of some sources are. Keeps the indexes that it looked into.

    Args:
        sources: By name, open.
    """

    def __init__(self, sources: dict[str, Source]) -> None:
        self._sources = sources
        self._indexes: dict[tuple[str, int], DocumentIndex] = {}

    def window(self, source: str, window: int) -> WindowFacts:
        """Read a window, and find its documents.

        Raises:
            DataError: There is no such window, or a file of its shard is missing or damaged.
            EnvironmentProblem: A file cannot be read.
        """
        opened = self._sources[source]
        shard, first = opened.locate(window)
        tokens = np.empty(opened.sequence_length + 1, opened.dtype)
        opened.read_into(window, tokens)
        end = first + len(tokens)
        documents = self.index(source, shard).between(first, end)
        loss_labels = None
        if opened.has_mask:
            mask = np.empty(opened.sequence_length, np.uint8)
            opened.read_mask_into(window, mask)
            loss_labels = int(np.count_nonzero(mask))
        return WindowFacts(
            source=source,
            window=window,
            shard=shard,
            prefix=opened.shard_place(shard),
            first_token=first,
            tokens=tokens,
            pieces=tuple(
                Piece(
                    document, max(first, document.first_token) - first, min(end, document.end_token) - first
                )
                for document in documents
            ),
            loss_labels=loss_labels,
        )

    def document(self, source: str, shard: int, number: int) -> DocumentWindows:
        """The windows that hold tokens of a document.

        Neighbouring windows share a token, the label of one and the first input of the next, so a document that
        begins at a window's first token is in the window before too: that is where its first token is predicted.

        Raises:
            DataError: There is no such document, or the shard's index is missing or damaged.
            EnvironmentProblem: The index cannot be read.
        """
        document = self.index(source, shard).span(number)
        windows = shard_windows(self._sources[source], shard)
        length = self._sources[source].sequence_length
        if not document.tokens or not windows:
            return DocumentWindows(shard, document, range(0))
        first = max(0, (document.first_token - 1) // length)
        last = (document.end_token - 1) // length
        return DocumentWindows(shard, document, windows[first : last + 1])

    def index(self, source: str, shard: int) -> DocumentIndex:
        """The documents of a shard."""
        key = (source, shard)
        if key not in self._indexes:
            self._indexes[key] = DocumentIndex(self._sources[source].shard_place(shard))
        return self._indexes[key]


def shard_windows(source: Source, shard: int) -> range:
    """The numbers of a shard's windows in its source."""
    numbers = range(source.num_windows)
    first, end = (
        bisect_left(numbers, wanted, key=lambda window: source.locate(window).shard)
        for wanted in (shard, shard + 1)
    )
    return numbers[first:end]


def find_shard(source: Source, text: str) -> int:
    """A shard by its number or its name.

    Raises:
        ConfigError: The source has no such shard, or several.
    """
    names = [source.shard_place(shard).name for shard in range(source.num_shards)]
    if text in names and names.count(text) == 1:
        return names.index(text)
    if text.isascii() and text.isdecimal() and int(text) < len(names):
        return int(text)
    raise ConfigError(
        f"Source {source.name} has no such shard.",
        found=f"{text}, which {names.count(text)} shards are called" if text in names else text,
        expected=f"0 to {len(names) - 1:,}, or a name such as {names[0]}",
    )


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text that a terminal shows and does not obey: what controls it is written as `\x1b` or `\u202e`.

    Args:
        text: From outside.
        lines: Leave line ends and tabs as they are; else they are written as `\n` and `\t`.
    """
    return "".join(_shown(character, lines) for character in text)


def _shown(character: str, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    if character in _JOINERS or unicodedata.category(character) not in _CONTROLS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def excerpt(text: str, first: int, last: int) -> tuple[str, str]:
    """The first and the last characters of a text; all of it and nothing where they would meet."""
    if len(text) <= first + last:
        return text, ""
    return text[:first], text[len(text) - last :]
