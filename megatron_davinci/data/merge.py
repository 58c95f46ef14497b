"""Several indexed datasets into one, as Megatron-Core's builder does with `add_index`, byte for byte."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_davinci.data.indexed import HEADER, Header, IndexedDataset, bin_path, idx_path, read_header
from megatron_davinci.data.indexed_writer import give_names, index_parts, refuse_existing
from megatron_davinci.data.mask import MaskWriter, check_padding, mask_blocks, mask_path, read_mask_header
from megatron_davinci.data.places import local_path
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors

_BLOCK = 1 << 20  # entries of an index in memory at a time
_COPY = 64 << 20
_READ = 8 << 20
# What file systems answer that cannot copy in the kernel, or not from one to the other.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class Merged:
    """What a merged dataset holds.

    Attributes:
        tokens: Tokens in `.bin`.
        sequences: Sequences in `.idx`.
        documents: Documents in `.idx`.
        bin_bytes: Size of `.bin`.
        has_mask: Whether there is a `.mask`.
    """

    tokens: int
    sequences: int
    documents: int
    bin_bytes: int
    has_mask: bool


@dataclass(frozen=True)
class _Part:
    prefix: Path
    header: Header

    def lengths(self) -> Iterator[np.ndarray]:
        return self._blocks("<i4", HEADER.size, self.header.sequences)

    def bounds(self, skip: int) -> Iterator[np.ndarray]:
        at = HEADER.size + 12 * self.header.sequences
        return self._blocks("<i8", at + 8 * skip, self.header.document_bounds - skip)

    def modes(self) -> Iterator[np.ndarray]:
        at = HEADER.size + 12 * self.header.sequences + 8 * self.header.document_bounds
        return self._blocks("i1", at, self.header.sequences)

    def _blocks(self, dtype: str, offset: int, count: int) -> Iterator[np.ndarray]:
        # Opened for each pass: thousands of datasets are merged with a handful of open files.
        path, itemsize = idx_path(self.prefix), np.dtype(dtype).itemsize
        for first in range(0, count, _BLOCK):
            want = min(_BLOCK, count - first)
            block = np.fromfile(path, dtype, want, offset=offset + first * itemsize)
            if len(block) < want:
                raise _shrank(path, offset + (first + len(block)) * itemsize)
            yield block


def merge_datasets(
    prefixes: Sequence[str | os.PathLike[str]],
    out_prefix: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> Merged:
    """Write one dataset with the documents of several, in the order given.

    Every input is checked wholly before anything is written, and the result before it gets its name. Memory is
    that of some megabytes, however long the indices are. The modes of multimodal datasets and the masks of those
    that have one are merged with them.

    Args:
        prefixes: Local datasets, without `.bin` or `.idx`.
        out_prefix: The dataset to make; nothing of that name may be there. Missing folders are made.
        progress: Called with the bytes of `.bin` done so far.

    Raises:
        DataError: There is no input, one is damaged, two differ in dtype, only some have a mask or modes, or the
            place is taken.
        EnvironmentProblem: The disk is full or failing. In every case nothing is left behind.
    """
    out = local_path(out_prefix)
    refuse_existing(out)
    parts, masked = _checked_parts([local_path(prefix) for prefix in prefixes])
    beside = out.with_name(f".{out.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    binary, index, mask = bin_path(beside), idx_path(beside), mask_path(beside)
    try:
        with disk_errors(out, "merging datasets"):
            out.parent.mkdir(parents=True, exist_ok=True)
            _write_tokens(parts, binary, progress)
            if masked:
                _write_mask(parts, mask)
            _write_index(parts, index)
            written = IndexedDataset(beside)
            refuse_existing(out)
            give_names(out, binary, mask if masked else None, index)
    finally:
        for path in (binary, index, mask):
            path.unlink(missing_ok=True)
    return Merged(
        tokens=written.num_tokens,
        sequences=len(written),
        documents=len(written.document_indices) - 1,
        bin_bytes=sum(part.header.bin_bytes for part in parts),
        has_mask=masked,
    )


def _checked_parts(prefixes: list[Path]) -> tuple[list[_Part], bool]:
    if not prefixes:
        raise DataError("There is nothing to merge.", expected="the prefix of at least one dataset")
    parts = [_Part(prefix, read_header(prefix)) for prefix in prefixes]
    first = parts[0]
    for part in parts[1:]:
        if part.header.dtype != first.header.dtype:
            raise DataError(
                "Datasets of different dtypes cannot be merged.",
                where=f"{idx_path(first.prefix)}, bytes 17 to 18\n{idx_path(part.prefix)}, bytes 17 to 18",
                found=f"{first.header.dtype.name} in the first, {part.header.dtype.name} in the second",
                expected="one dtype in all of them",
                do="write one of them again with the other's dtype",
            )
    masked = _all_or_none(parts, [mask_path(p.prefix).exists() for p in parts], "a mask")
    # An empty dataset has no sequence, and so no mode that it could lack.
    some = [part for part in parts if part.header.sequences]
    _all_or_none(some, [part.header.has_modes for part in some], "modes of its sequences")
    for part in parts:
        IndexedDataset(part.prefix)
        if masked:
            read_mask_header(part.prefix, part.header.num_tokens)
            check_padding(part.prefix, part.header.num_tokens)
    return parts, masked


def _all_or_none(parts: list[_Part], have: list[bool], what: str) -> bool:
    if any(have) and not all(have):
        one, none = (parts[have.index(there)].prefix for there in (True, False))
        raise DataError(
            f"Only some of the datasets have {what}.",
            where=none,
            found=f"{one.name} has {what}, {none.name} has not ({sum(have)} of {len(have)} have)",
            expected="all of them, or none",
            do="merge them apart from the others, or restore what is missing",
        )
    return bool(have) and have[0]


def _write_index(parts: list[_Part], path: Path) -> None:
    def bounds() -> Iterator[np.ndarray]:
        yield np.zeros(1, np.int64)
        sequences = 0
        for part in parts:
            # The first bound, 0, is the last of the part before.
            for block in part.bounds(skip=1):
                yield block + sequences
            sequences += part.header.sequences

    pieces = index_parts(
        parts[0].header.dtype,
        sum(part.header.sequences for part in parts),
        lambda: (block for part in parts for block in part.lengths()),
        1 + sum(part.header.document_bounds - 1 for part in parts),
        bounds,
        (lambda: (block for part in parts for block in part.modes()))
        if any(part.header.has_modes for part in parts)
        else None,
    )
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _write_mask(parts: list[_Part], path: Path) -> None:
    writer = MaskWriter(path)
    try:
        for part in parts:
            for block in mask_blocks(part.prefix, part.header.num_tokens):
                writer.add(block)
        writer.finish()
    finally:
        writer.close()


def _write_tokens(parts: list[_Part], path: Path, progress: Callable[[int], None] | None) -> None:
    with open(path, "xb") as out:
        done = 0
        for part in parts:
            with open(bin_path(part.prefix), "rb") as file:
                for copied in _copy(file.fileno(), out.fileno(), part.header.bin_bytes, done, part.prefix):
                    if progress is not None:
                        progress(done + copied)
            done += part.header.bin_bytes
        # What ends in a hole has not reached its length yet.
        os.ftruncate(out.fileno(), done)
        os.fsync(out.fileno())


def _copy(source: int, out: int, size: int, at: int, prefix: Path) -> Iterator[int]:
    """Copy `size` bytes to byte `at` of `out`; what is a hole stays one. Yields the bytes done so far."""
    begin = 0
    while begin < size and (begin := _next_data(source, begin, size)) < size:
        end = min(os.lseek(source, begin, os.SEEK_HOLE), size, begin + _COPY)
        while begin < end:
            count = _copy_some(source, out, end - begin, begin, at + begin)
            if count == 0:
                raise _shrank(bin_path(prefix), begin)
            begin += count
        yield begin
    if os.fstat(source).st_size != size:
        raise _shrank(bin_path(prefix), os.fstat(source).st_size)
    yield size


def _next_data(source: int, begin: int, size: int) -> int:
    try:
        return os.lseek(source, begin, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return size
        raise


def _copy_some(source: int, out: int, count: int, offset: int, at: int) -> int:
    """Copy up to `count` bytes, inside the kernel where it can. Returns the bytes copied; 0 at the file's end."""
    try:
        if copied := os.copy_file_range(source, out, count, offset, at):
            return copied
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    piece = os.pread(source, min(count, _READ), offset)
    written = 0
    while written < len(piece):
        written += os.pwrite(out, piece[written:], at + written)
    return len(piece)


def _shrank(path: Path, end: int) -> DataError:
    return DataError(
        "A file changed while it was merged.",
        where=path,
        found=f"an end at byte {end:,}",
        expected="the size that it had when it was checked",
        do="merge again when nothing writes to it",
    )
