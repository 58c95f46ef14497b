"""One piece of the input to one part: read, encode, append the end of each document, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.data import text_inputs
from megatron_davinci.data.fast_bpe import Encoder
from megatron_davinci.data.jsonl import Document, Fields, document_of
from megatron_davinci.data.parts import PartRecord, PartWriter
from megatron_davinci.data.text_inputs import Piece
from megatron_davinci.errors import DataError

OnError = Literal["stop", "skip"]

# What is encoded at once: enough for the encoder to run long, little enough for texts and ids to stay in the
# processor's cache on their way.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 400_000


class PartEncoder:
    """Makes parts of pieces.

    Args:
        encoder: Text to ids.
        fields: What the records' fields are called. With fields for questions and answers, parts have loss flags: 0
            for the tokens of a prompt, 1 for those of its answer with the end of the document, and for plain text.
            Prompt and answer are encoded each by itself and joined, so that no token holds a bit of both.
        eod_id: Appended to each document; None for nothing.
        dtype: The tokens'.
        vocab_size: No id reaches it.
        keep_empty: Whether an empty text is a document, of no token and no end, as it is to Megatron-LM.
    """

    def __init__(
        self,
        encoder: Encoder,
        fields: Fields,
        eod_id: int | None,
        dtype: np.dtype,
        vocab_size: int,
        keep_empty: bool = False,
    ) -> None:
        self._encoder, self._fields, self._eod_id = encoder, fields, eod_id
        self._dtype, self._vocab_size, self._keep_empty = dtype, vocab_size, keep_empty
        self.mask = fields.prompt is not None

    def encode(
        self,
        piece: Piece,
        number: int,
        folder: Path,
        on_error: OnError = "stop",
        progress: Callable[[int], None] | None = None,
    ) -> PartRecord:
        """Make part `number` of a piece.

        Args:
            piece: What to read.
            number: The part's.
            folder: Where parts are kept.
            on_error: Whether a bad record ends the job, or is kept apart in the part.
            progress: Called with the bytes of the piece done so far, after each batch.

        Raises:
            DataError: A record is bad, and `on_error` is `stop`; or an id is outside the vocabulary.
            EnvironmentProblem: The disk is full or failing.
        """
        batch: list[Document] = []
        characters = 0
        with PartWriter(folder, number, self._dtype, self.mask) as part:
            for record in text_inputs.read(piece, self._fields):
                try:
                    if isinstance(record.content, DataError):
                        raise record.content
                    document = document_of(record.content, self._fields, "")
                except DataError as error:
                    if on_error == "stop":
                        raise _located(error, piece, record.number) from error
                    content = None if isinstance(record.content, DataError) else record.content
                    rest = error.rest if isinstance(error, text_inputs.FileEndsEarly) else None
                    part.add_bad(record.number, error, content, rest=rest)
                    continue
                if not document.text and document.response is None:
                    part.empty += 1
                    if not self._keep_empty:
                        continue
                part.pairs += document.response is not None
                batch.append(document)
                characters += len(document.text) + len(document.response or "")
                if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                    part.add(*self.tokens(batch))
                    batch, characters = [], 0
                    if progress is not None:
                        progress(record.done)
            if batch:
                part.add(*self.tokens(batch))
        return part.record

    def tokens(
        self, documents: list[Document]
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint8] | None]:
        """The tokens of documents one after the other, the tokens of each, and the loss flag of each token.

        Returns:
            [n] in the shards' dtype, [documents] int64, and [n] uint8 (None without a mask).

        Raises:
            DataError: An id is outside the vocabulary.
        """
        texts: list[str] = []
        for document in documents:
            texts.append(document.text)
            if document.response is not None:
                texts.append(document.response)
        ids, counts = self._encoder.encode(texts)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise DataError(
                "The encoder gave an id outside the vocabulary.",
                where=self._encoder.name,
                found=int(ids.max()),
                expected=f"0 to {self._vocab_size - 1:,}",
            )
        # The tokens of each document: those of its one text, or of its two.
        firsts = np.cumsum([0] + [1 if one.response is None else 2 for one in documents[:-1]])
        sizes: NDArray[np.int64] = np.add.reduceat(counts, firsts)
        # Megatron-LM ends no document that has no token.
        ended = (sizes > 0) if self._keep_empty else np.ones(len(documents), np.bool_)
        lengths: NDArray[np.int64] = sizes if self._eod_id is None else sizes + ended
        out = np.empty(int(lengths.sum()), self._dtype)
        if self._eod_id is None:
            out[:] = ids
        else:
            text = np.ones(len(out), np.bool_)
            text[np.cumsum(lengths)[ended] - 1] = False
            out[text] = ids
            out[~text] = self._eod_id
        if not self.mask:
            return out, lengths, None
        loss = np.ones(len(out), np.uint8)
        starts = (np.cumsum(lengths) - lengths).tolist()
        for document, start, segment in zip(documents, starts, firsts.tolist()):
            if document.response is not None:
                loss[start : start + int(counts[segment])] = 0
        return out, lengths, loss


def _located(error: DataError, piece: Piece, number: int) -> DataError:
    """The error with the line in the file, which a piece does not know before it is asked."""
    line = text_inputs.lines_before(piece) + number
    return DataError(
        error.what,
        where=f"{piece.path}:{line}",
        found=error.found,
        expected=error.expected,
        do=error.do
        or "mend the line; or go on without such lines by --on-error skip, which keeps them apart",
    )
