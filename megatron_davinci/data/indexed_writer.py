"""Writing indexed datasets: both files appear whole, or neither does."""

from __future__ import annotations

import hashlib
import os
import uuid
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_davinci.data.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatron_davinci.errors import DataError, EnvironmentProblem
from megatron_davinci.files import disk_errors, fsync_folder

_MAX_SEQUENCE = np.iinfo(np.int32).max
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Written:
    """What a writer has put on disk.

    Attributes:
        tokens: Tokens in `.bin`.
        sequences: Sequences in `.idx`.
        documents: Documents in `.idx`.
        bin_bytes: Size of `.bin`.
        bin_sha256: Hex digest of the bytes of `.bin` as they were handed to the disk.
    """

    tokens: int
    sequences: int
    documents: int
    bin_bytes: int
    bin_sha256: str


class IndexedDatasetWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`, which get their names when the `with` block ends well.

    Until then the tokens are in `<prefix>.bin.tmp-*`, which is removed when the block raises. The `.bin` is renamed
    first and the `.idx` last, both after `fsync`: a crash in between leaves a dataset that does not open.

    Args:
        prefix: Path without `.bin` or `.idx`; missing folders are made.
        dtype: Integer dtype of the tokens, one that the format has.
        overwrite: Replace a dataset of that name.

    Raises:
        DataError: The dtype is not one of the format's, or the dataset is there already.
        EnvironmentProblem: The disk is full or failing; nothing is left behind.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, *, overwrite: bool = False
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES or self.dtype.kind not in "iu":
            names = ", ".join(d.name for d in DTYPE_CODES if d.kind in "iu")
            raise DataError(
                "Token ids cannot be stored in this dtype.", found=self.dtype.name, expected=names
            )
        limits = np.iinfo(self.dtype)
        self._lowest, self._highest = int(limits.min), int(limits.max)
        self._overwrite = overwrite
        self._refuse_existing()
        self._temporary = _temporary(bin_path(self.prefix))
        self._lengths, self._bounds = array("i"), array("q", [0])
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._failure: EnvironmentProblem | None = None
        self._written: Written | None = None

    def __enter__(self) -> IndexedDatasetWriter:
        """Create the temporary file."""
        with disk_errors(self._temporary, "creating a dataset"):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "xb", buffering=_BUFFER)
        return self

    def add_document(
        self, tokens: npt.ArrayLike, lengths: Sequence[int] | npt.NDArray[np.integer] | None = None
    ) -> None:
        """Append one document. An end-of-document token is the caller's to add, as the last of `tokens`.

        Args:
            tokens: [n] integers.
            lengths: Tokens of each sequence of the document; they sum to n. Default: one sequence of n tokens.

        Raises:
            DataError: A token does not fit the dtype or is no integer, or the lengths are impossible. Nothing of
                the document is written.
            EnvironmentProblem: The disk is full or failing.
        """
        values = self._checked(tokens)
        sizes = [len(values)] if lengths is None else [int(length) for length in lengths]
        if sum(sizes) != len(values) or any(not 0 <= size <= _MAX_SEQUENCE for size in sizes):
            raise DataError(
                "A document's sequence lengths are impossible.",
                where=f"{self.prefix}, document {len(self._bounds) - 1:,}",
                found=f"{len(sizes)} lengths that sum to {sum(sizes):,}",
                expected=f"lengths of 0 to 2^31 - 1 that sum to the document's {len(values):,} tokens",
            )
        raw = values.data.cast("B") if len(values) else b""
        try:
            with disk_errors(self._temporary, "writing tokens"):
                self._file.write(raw)
        except EnvironmentProblem as error:
            self._failure = error
            raise
        self._digest.update(raw)
        self._tokens += len(values)
        self._lengths.extend(sizes)
        self._bounds.append(len(self._lengths))

    @property
    def written(self) -> Written:
        """What is on disk, once the block has ended.

        Raises:
            DataError: The block has not ended.
        """
        if self._written is None:
            raise DataError("A dataset is complete when its writer's block has ended.", where=self.prefix)
        return self._written

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give both files their names, or remove what was written if the block raised."""
        made = [self._temporary]
        try:
            if kind is None:
                if self._failure is not None:
                    # The caller went on after a failed write: the file lacks part of a document.
                    raise self._failure
                self._refuse_existing()
                with disk_errors(self.prefix, "finishing a dataset"):
                    self._commit(made)
        finally:
            # Closing writes what is buffered, and may fail on the same full disk again.
            with suppress(OSError):
                self._file.close()
            for path in made:
                path.unlink(missing_ok=True)

    def _commit(self, made: list[Path]) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        idx, binary = idx_path(self.prefix), bin_path(self.prefix)
        temporary = _temporary(idx)
        made.append(temporary)
        with open(temporary, "xb") as file:
            for part in self._index_parts():
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        # Without its old index a replaced dataset does not open, where a mixed pair might.
        idx.unlink(missing_ok=True)
        os.replace(self._temporary, binary)
        made.append(binary)
        os.replace(temporary, idx)
        made.clear()
        fsync_folder(self.prefix.parent)
        self._written = Written(
            tokens=self._tokens,
            sequences=len(self._lengths),
            documents=len(self._bounds) - 1,
            bin_bytes=self._tokens * self.dtype.itemsize,
            bin_sha256=self._digest.hexdigest(),
        )

    def _index_parts(self) -> list[bytes | memoryview]:
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), "<i8")
        # In int64 from the start: sums of int32 lengths pass 2^31 in any large shard.
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], len(lengths), len(self._bounds))
        bounds = np.frombuffer(self._bounds, np.int64).astype("<i8")
        return [header, lengths.astype("<i4").tobytes(), pointers.tobytes(), bounds.tobytes()]

    def _checked(self, tokens: npt.ArrayLike) -> np.ndarray:
        values = np.asarray(tokens)
        if values.size == 0:
            return np.empty(0, self.dtype)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise DataError(
                "A document is not a list of token ids.",
                where=f"{self.prefix}, document {len(self._bounds) - 1:,}",
                found=f"{values.dtype} of shape {list(values.shape)}",
                expected="integers of shape [tokens]",
            )
        # Before the cast, which would wrap 70000 to 4464 in uint16 and say nothing.
        low, high = int(values.min()), int(values.max())
        if low < self._lowest or high > self._highest:
            at = int(np.argmin(values) if low < self._lowest else np.argmax(values))
            raise DataError(
                "A token id does not fit the dataset's dtype.",
                where=f"{self.prefix}, document {len(self._bounds) - 1:,}, token {at:,}",
                found=int(values[at]),
                expected=f"{self._lowest:,} to {self._highest:,} ({self.dtype.name})",
                do="choose the dtype with dtype_for_vocab(largest_id), counting added tokens",
            )
        return np.ascontiguousarray(values, dtype=self.dtype)

    def _refuse_existing(self) -> None:
        for path in (idx_path(self.prefix), bin_path(self.prefix)):
            if path.exists() and not self._overwrite:
                raise DataError(
                    "A dataset of this name is there already.",
                    where=path,
                    do="choose another prefix, remove the dataset, or ask to overwrite it",
                )


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
