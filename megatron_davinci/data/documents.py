"""Which documents lie where in a token file: looked up in its index, of which a few blocks are read."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.indexed import HEADER, idx_path, read_header
from megatron_davinci.data.places import Place
from megatron_davinci.data.storage import Blob, open_blob
from megatron_davinci.errors import DataError

_BLOCK = 512  # numbers read at once
_KEPT = 1024  # blocks


class Document(NamedTuple):
    """Where a document lies in its shard.

    Attributes:
        number: In the shard, from 0 on.
        first_token: Its first token in the shard.
        tokens: How many it has; 0 for an empty one.
    """

    number: int
    first_token: int
    tokens: int

    @property
    def end_token(self) -> int:
        """The token after its last."""
        return self.first_token + self.tokens


class DocumentIndex:
    """The documents of one shard, found by binary search over its `.idx`.

    A look-up reads some thirty blocks of 4 KiB of an index of a billion documents, and keeps them. It checks what it
    reads; whether the rest of the index is sound is for `IndexedDataset` to say, which reads all of it.

    Args:
        prefix: The shard, without `.bin` or `.idx`; local, or in S3.

    Raises:
        DataError: A file is missing, or the header is wrong.
        EnvironmentProblem: The index cannot be read.
    """

    def __init__(self, prefix: Place) -> None:
        self._header = header = read_header(prefix)
        self._idx = idx_path(prefix)
        blob = open_blob(self._idx)
        sequences = header.sequences
        self._pointers = _Column(blob, HEADER.size + 4 * sequences, sequences)
        self._bounds = _Column(blob, HEADER.size + 12 * sequences, header.document_bounds)

    def __len__(self) -> int:
        """Documents in the shard, empty ones included."""
        return max(0, len(self._bounds) - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard."""
        return self._header.num_tokens

    def span(self, number: int) -> Document:
        """Where a document lies.

        Raises:
            DataError: There is no such document, or the index is damaged where it speaks of it.
        """
        if not 0 <= number < len(self):
            raise DataError(
                "A shard has no such document.",
                where=self._idx,
                found=f"document {number:,}",
                expected=f"0 to {len(self) - 1:,}" if len(self) else "none: the shard is empty",
            )
        # The neighbours' bounds too: a search that a wrong bound led astray may end where all looks well.
        near = [
            self._bounds[bound] for bound in range(max(0, number - 1), min(number + 3, len(self._bounds)))
        ]
        if near != sorted(near):
            raise self._damaged(number, "document bounds " + ", ".join(f"{bound:,}" for bound in near))
        first, end = (self._token_of(self._bounds[bound], number) for bound in (number, number + 1))
        if end < first:
            raise self._damaged(number, f"tokens {first:,} to {end:,}")
        return Document(number, first, end - first)

    def at(self, token: int) -> Document:
        """The document that a token of the shard belongs to.

        Args:
            token: 0 to `num_tokens - 1`.

        Raises:
            DataError: The index is damaged where it speaks of the token.
        """
        # Of several with one beginning only the last has tokens: empty ones end where they begin.
        sequence = bisect_right(self._pointers, token * self._header.dtype.itemsize) - 1
        number = bisect_right(self._bounds, sequence) - 1
        if not 0 <= number < len(self):
            raise self._damaged(number, f"no document with token {token:,}")
        document = self.span(number)
        if not document.first_token <= token < document.end_token:
            raise self._damaged(
                number, f"tokens {document.first_token:,} to {document.end_token:,}, without {token:,}"
            )
        return document

    def between(self, first: int, end: int) -> list[Document]:
        """The documents that have tokens in `[first, end)`, in order.

        Raises:
            DataError: As `at`.
        """
        found: list[Document] = []
        while first < end:
            following = found[-1].number + 1 if found else len(self)
            document = self.span(following) if following < len(self) else None
            if document is None or not document.tokens or document.first_token != first:
                document = self.at(first)
            found.append(document)
            first = document.end_token
        return found

    def _token_of(self, sequence: int, document: int) -> int:
        """The token with which a sequence begins; of the one after the last, the end."""
        if sequence == self._header.sequences:
            return self._header.num_tokens
        if not 0 <= sequence < self._header.sequences:
            raise self._damaged(document, f"a bound at sequence {sequence:,}")
        pointer, itemsize = self._pointers[sequence], self._header.dtype.itemsize
        if not 0 <= pointer <= self._header.bin_bytes or pointer % itemsize:
            raise self._damaged(document, f"a sequence at byte {pointer:,}")
        return pointer // itemsize

    def _damaged(self, document: int, found: str) -> DataError:
        return DataError(
            "An index contradicts itself.",
            where=f"{self._idx}, document {document:,}",
            found=found,
            expected="documents back to back, inside the token file",
            do="restore the file, or write the source again",
        )


class _Column:
    """The int64 numbers of one part of a file, read in blocks as they are asked for."""

    def __init__(self, blob: Blob, offset: int, count: int) -> None:
        self._blob, self._offset, self._count = blob, offset, count
        self._blocks: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        number, inside = divmod(index, _BLOCK)
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= _KEPT:
                self._blocks.clear()
            block = np.empty(min(_BLOCK, self._count - number * _BLOCK), "<i8")
            self._blob.read_into(self._offset + 8 * _BLOCK * number, block.data.cast("B"))
            self._blocks[number] = block
        return int(block[inside])
