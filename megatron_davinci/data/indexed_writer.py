"""Writing indexed datasets: all of its files appear whole, or none does."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_davinci.data.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatron_davinci.data.mask import MaskWriter, checked_loss, mask_path
from megatron_davinci.data.places import local_path
from megatron_davinci.data.spool import Spool
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
        mask_sha256: Hex digest of `.mask`; None if there is none.
        idx_sha256: Hex digest of `.idx`.
    """

    tokens: int
    sequences: int
    documents: int
    bin_bytes: int
    bin_sha256: str
    mask_sha256: str | None = None
    idx_sha256: str | None = None


class IndexedDatasetWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`, which get their names when the `with` block ends well.

    Until then the tokens are in `<prefix>.bin.tmp-*`, which is removed when the block raises. The `.bin` is renamed
    first, a `.mask` next and the `.idx` last, all after `fsync`: a crash in between leaves a dataset that does not
    open.

    Args:
        prefix: Path without `.bin` or `.idx`; missing folders are made.
        dtype: Dtype of the tokens, one that the format has. A float's are values and no token ids: Megatron-Core
            reads such a dataset, training does not.
        overwrite: Replace a dataset of that name.
        mask: Write `<prefix>.mask` too, which says what tokens carry loss.

    Raises:
        DataError: The dtype is not one of the format's, or the dataset is there already.
        EnvironmentProblem: The disk is full or failing; nothing is left behind.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: npt.DTypeLike,
        *,
        overwrite: bool = False,
        mask: bool = False,
    ) -> None:
        self.prefix = local_path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES:
            names = ", ".join(d.name for d in DTYPE_CODES)
            raise DataError("Tokens cannot be stored in this dtype.", found=self.dtype.name, expected=names)
        self._overwrite = overwrite
        self._refuse_existing()
        self._temporary = temporary_path(bin_path(self.prefix))
        self._mask_temporary = temporary_path(mask_path(self.prefix)) if mask else None
        self._mask: MaskWriter | None = None
        self._lengths, self._bounds = Spool("i", self.prefix.parent), Spool("q", self.prefix.parent)
        self._bounds.extend([0])
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._failure: EnvironmentProblem | None = None
        self._written: Written | None = None

    def __enter__(self) -> IndexedDatasetWriter:
        """Create the temporary files."""
        with disk_errors(self._temporary, "creating a dataset"):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "xb", buffering=_BUFFER)
            if self._mask_temporary is not None:
                try:
                    self._mask = MaskWriter(self._mask_temporary)
                except BaseException:
                    self._close([self._temporary, self._mask_temporary])
                    raise
        return self

    def add_document(
        self,
        tokens: npt.ArrayLike,
        lengths: Sequence[int] | npt.NDArray[np.integer] | None = None,
        loss: npt.ArrayLike | None = None,
    ) -> None:
        """Append one document. An end-of-document token is the caller's to add, as the last of `tokens`.

        Args:
            tokens: [n] integers; for a float dtype, numbers.
            lengths: Tokens of each sequence of the document; they sum to n. Default: one sequence of n tokens.
            loss: [n] booleans, or 0 and 1: whether predicting this token counts. Default: every one does.

        Raises:
            DataError: A token does not fit the dtype or is no integer, the lengths are impossible, or the loss
                flags do not fit the tokens or the writer has no mask. Nothing of the document is written.
            EnvironmentProblem: The disk is full or failing.
        """
        self._add(tokens, lengths, loss)
        self._append(self._bounds, [len(self._lengths)])

    def _add(
        self,
        tokens: npt.ArrayLike,
        lengths: Sequence[int] | npt.NDArray[np.integer] | None,
        loss: npt.ArrayLike | None,
    ) -> None:
        """`add_document` but for the document's bound."""
        where = f"{self.prefix}, document {len(self._bounds) - 1:,}"
        values = checked_tokens(tokens, self.dtype, where)
        sizes = np.asarray([len(values)] if lengths is None else lengths, np.int64)
        total = int(sizes.sum())
        if total != len(values) or (len(sizes) and not 0 <= sizes.min() <= sizes.max() <= _MAX_SEQUENCE):
            raise DataError(
                "A document's sequence lengths are impossible.",
                where=where,
                found=f"{len(sizes)} lengths that sum to {total:,}",
                expected=f"lengths of 0 to 2^31 - 1 that sum to the document's {len(values):,} tokens",
            )
        if loss is not None and self._mask is None:
            raise DataError(
                "Loss flags were given to a writer without a mask.",
                where=where,
                do="make the writer with mask=True",
            )
        flags = np.ones(len(values), np.uint8) if loss is None else checked_loss(loss, len(values), where)
        raw = values.data.cast("B") if len(values) else b""
        try:
            with disk_errors(self._temporary, "writing tokens"):
                self._file.write(raw)
                if self._mask is not None:
                    self._mask.add(flags)
        except EnvironmentProblem as error:
            self._failure = error
            raise
        self._digest.update(raw)
        self._tokens += len(values)
        self._append(self._lengths, sizes)

    def _append(self, spool: Spool, values: npt.ArrayLike) -> None:
        try:
            with disk_errors(self._temporary, "writing an index"):
                spool.extend(values)
        except EnvironmentProblem as error:
            self._failure = error
            raise

    def write_early(self) -> None:
        """Wait until what has been added is on disk, so that there is less to wait for at the end.

        Raises:
            EnvironmentProblem: The disk is full or failing.
        """
        try:
            with disk_errors(self._temporary, "writing tokens"):
                self._file.flush()
                os.fdatasync(self._file.fileno())
        except EnvironmentProblem as error:
            self._failure = error
            raise

    def add_documents(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.NDArray[np.integer],
        loss: npt.ArrayLike | None = None,
    ) -> None:
        """Append documents of one sequence each: as `add_document` for each, but fast where they are short.

        A document of no token has no sequence, as in what Megatron-LM's preprocessing writes.

        Args:
            tokens: [n], the documents' tokens one after the other.
            lengths: [documents], tokens of each; they sum to n.
            loss: [n], as for `add_document`.

        Raises:
            DataError: As `add_document`.
            EnvironmentProblem: The disk is full or failing.
        """
        if not len(lengths):
            return
        some = np.asarray(lengths) > 0
        before = len(self._lengths)
        self._add(tokens, lengths[some], loss)
        self._append(self._bounds, before + np.cumsum(some))

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
        """Give the files their names, or remove what was written if the block raised."""
        made = [path for path in (self._temporary, self._mask_temporary) if path is not None]
        try:
            if kind is None:
                if self._failure is not None:
                    # The caller went on after a failed write: the file lacks part of a document.
                    raise self._failure
                self._refuse_existing()
                with disk_errors(self.prefix, "finishing a dataset"):
                    self._commit(made)
        finally:
            self._close(made)

    def _close(self, made: list[Path]) -> None:
        # Closing writes what is buffered, and may fail on the same full disk again.
        with suppress(OSError):
            self._file.close()
        if self._mask is not None:
            with suppress(OSError):
                self._mask.close()
        for spool in (self._lengths, self._bounds):
            spool.close()
        for path in made:
            path.unlink(missing_ok=True)

    def _commit(self, made: list[Path]) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        mask_sha256 = self._mask.finish() if self._mask is not None else None
        temporary = temporary_path(idx_path(self.prefix))
        made.append(temporary)
        index_digest = hashlib.sha256()
        with open(temporary, "xb") as file:
            for part in self._index_parts():
                file.write(part)
                index_digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        # Without its old index a replaced dataset does not open, where a mixed pair might.
        idx_path(self.prefix).unlink(missing_ok=True)
        mask_path(self.prefix).unlink(missing_ok=True)
        give_names(self.prefix, self._temporary, self._mask_temporary, temporary)
        made.clear()
        self._written = Written(
            tokens=self._tokens,
            sequences=len(self._lengths),
            documents=len(self._bounds) - 1,
            bin_bytes=self._tokens * self.dtype.itemsize,
            bin_sha256=self._digest.hexdigest(),
            mask_sha256=mask_sha256,
            idx_sha256=index_digest.hexdigest(),
        )

    def _index_parts(self) -> Iterator[bytes]:
        lengths, bounds = self._lengths, self._bounds
        return index_parts(self.dtype, len(lengths), lengths.blocks, len(bounds), bounds.blocks)

    def _refuse_existing(self) -> None:
        if not self._overwrite:
            refuse_existing(self.prefix)


def index_parts(
    dtype: np.dtype,
    sequences: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    document_bounds: int,
    bounds: Callable[[], Iterable[np.ndarray]],
    modes: Callable[[], Iterable[np.ndarray]] | None = None,
) -> Iterator[bytes]:
    """The bytes of an `.idx`, a piece at a time.

    Args:
        dtype: Of the tokens.
        sequences: S.
        lengths: Gives the S lengths in blocks; called twice.
        document_bounds: D.
        bounds: Gives the D document bounds in blocks.
        modes: Gives the S modes of a multimodal dataset in blocks.
    """
    yield HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], sequences, document_bounds)
    for block in lengths():
        yield block.astype("<i4").tobytes()
    end = 0
    for block in lengths():
        # In int64 from the start: sums of int32 lengths pass 2^31 in any large shard.
        ends = end + np.cumsum(block, dtype=np.int64)
        yield ((ends - block) * dtype.itemsize).astype("<i8").tobytes()
        end = int(ends[-1])
    for block in bounds():
        yield block.astype("<i8").tobytes()
    for block in modes() if modes is not None else ():
        yield block.astype("i1").tobytes()


def give_names(prefix: Path, binary: Path, mask: Path | None, index: Path) -> None:
    """Rename finished files to a dataset's names, the index last; if one fails, none keeps its new name.

    Raises:
        OSError: A rename failed.
    """
    named: list[Path] = []
    try:
        for temporary, path in (
            (binary, bin_path(prefix)),
            (mask, mask_path(prefix)),
            (index, idx_path(prefix)),
        ):
            if temporary is not None:
                os.replace(temporary, path)
                named.append(path)
    except BaseException:
        for path in named:
            path.unlink(missing_ok=True)
        raise
    fsync_folder(prefix.parent)


def checked_tokens(tokens: npt.ArrayLike, dtype: np.dtype, where: str) -> np.ndarray:
    """A document's tokens in the dataset's dtype: [n], contiguous.

    Raises:
        DataError: They are no list of numbers of the dtype's kind, or one does not fit it.
    """
    values = np.asarray(tokens)
    if values.size == 0:
        return np.empty(0, dtype)
    kinds = "iu" if dtype.kind in "iu" else "iuf"
    if values.ndim != 1 or values.dtype.kind not in kinds:
        raise DataError(
            "A document is not a list of token ids.",
            where=where,
            found=f"{values.dtype} of shape {list(values.shape)}",
            expected=f"{'integers' if kinds == 'iu' else 'numbers'} of shape [tokens]",
        )
    if dtype.kind == "f":
        return _checked_floats(values, dtype, where)
    # Before the cast, which would wrap 70000 to 4464 in uint16 and say nothing.
    limits = np.iinfo(dtype)
    low, high = int(values.min()), int(values.max())
    if low < limits.min or high > limits.max:
        at = int(np.argmin(values) if low < limits.min else np.argmax(values))
        raise DataError(
            "A token id does not fit the dataset's dtype.",
            where=f"{where}, token {at:,}",
            found=int(values[at]),
            expected=f"{limits.min:,} to {limits.max:,} ({dtype.name})",
            do="choose the dtype with dtype_for_vocab(largest_id), counting added tokens",
        )
    return np.ascontiguousarray(values, dtype=dtype)


def _checked_floats(values: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Floats may be rounded, as any float is; integers may not, and nothing finite may become infinite."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype=dtype)
    if values.dtype.kind == "f":
        bad = np.flatnonzero(np.isinf(cast) & ~np.isinf(values))
    else:
        largest = 1 << (np.finfo(dtype).nmant + 1)  # up to here every integer is a float
        bad = np.flatnonzero((values > largest) | (values < -largest))
    if len(bad):
        raise DataError(
            "A value does not fit the dataset's dtype.",
            where=f"{where}, token {int(bad[0]):,}",
            found=values[bad[0]],
            expected=f"a finite {dtype.name}" if values.dtype.kind == "f" else f"at most {largest:,}",
        )
    return cast


def refuse_existing(prefix: Path) -> None:
    """Raise unless the names of a dataset's files are free.

    Raises:
        DataError: One of them is taken.
    """
    for path in (idx_path(prefix), bin_path(prefix), mask_path(prefix)):
        if path.exists():
            raise DataError(
                "A dataset of this name is there already.",
                where=path,
                do="choose another prefix, or remove the dataset",
            )


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
