"""Indexed datasets: token ids in `<prefix>.bin`, where each sequence lies in `<prefix>.idx`.

The bytes are those of `megatron.core.datasets.indexed_dataset` (Megatron-LM, NVIDIA), both ways. `.bin` is token
ids back to back, little-endian. `.idx`, with S sequences and D = documents + 1:

| offset      | bytes | content                                                      |
|-------------|-------|--------------------------------------------------------------|
| 0           | 9     | magic `MMIDIDX\\x00\\x00`                                      |
| 9           | 8     | uint64 version, 1                                            |
| 17          | 1     | uint8 dtype code                                             |
| 18          | 8     | uint64 S                                                     |
| 26          | 8     | uint64 D                                                     |
| 34          | 4S    | int32 tokens of each sequence                                |
| 34+4S       | 8S    | int64 byte offset of each sequence in `.bin`                 |
| 34+12S      | 8D    | int64 document bounds as sequence numbers: first 0, last S   |
| 34+12S+8D   | S     | int8 mode of each sequence; only in multimodal files         |

The format has no checksum, so everything that it does imply is checked when a file is opened; what it cannot
show (a changed token) is the manifest's digest to find.
"""

from __future__ import annotations

import mmap
import operator
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_davinci.data.places import Place, S3Path, place
from megatron_davinci.data.storage import Blob, open_blob, open_if_there, read_all
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem

P = TypeVar("P", Path, S3Path, Path | S3Path)

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[np.dtype, int] = {
    np.dtype(name): code
    for name, code in (
        ("u1", 1),
        ("i1", 2),
        ("<i2", 3),
        ("<i4", 4),
        ("<i8", 5),
        ("<f8", 6),
        ("<f4", 7),
        ("<u2", 8),
    )
}
HEADER = struct.Struct("<9sQBQQ")

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_BLOCK = 1 << 20  # sequences checked at a time: bounds the memory that opening a huge index takes


def dtype_for_vocab(largest_id: int) -> np.dtype:
    """The narrowest dtype that holds the ids 0 to `largest_id`: uint16, else int32 (the format has no uint32).

    Args:
        largest_id: The largest id that the tokenizer can give, added tokens included.

    Raises:
        DataError: `largest_id` is negative or does not fit int32.
    """
    if 0 <= largest_id <= np.iinfo(np.uint16).max:
        return np.dtype("<u2")
    if 0 <= largest_id <= np.iinfo(np.int32).max:
        return np.dtype("<i4")
    raise DataError("No token dtype holds this vocabulary.", found=largest_id, expected="0 to 2^31 - 1")


def token_dtype(name: str | None, vocab_size: int) -> np.dtype:
    """The dtype that is asked for, or the narrowest, if it is one that holds the vocabulary.

    Raises:
        ConfigError: It is none of the format's, or too small.
        DataError: No dtype is large enough.
    """
    if name is None:
        return dtype_for_vocab(vocab_size - 1)
    possible = [d for d in DTYPE_CODES if d.kind in "iu" and np.iinfo(d).max >= vocab_size - 1]
    try:
        dtype = np.dtype(np.dtype(name).name)
    except TypeError:
        dtype = None
    if dtype not in possible:
        raise ConfigError(
            "Tokens cannot be stored in this dtype.",
            where="dtype",
            found=name,
            expected=f"one that holds the ids of a vocabulary of {vocab_size:,}: "
            + ", ".join(d.name for d in possible),
        )
    return dtype


def bin_path(prefix: P) -> P:
    """The token file of a prefix; the prefix may hold dots.

    Raises:
        DataError: The prefix has no last part, as `/` and `.` have none.
    """
    return _beside(prefix, ".bin")


def idx_path(prefix: P) -> P:
    """The index file of a prefix; as `bin_path`."""
    return _beside(prefix, ".idx")


def _beside(prefix: P, ending: str) -> P:
    if not prefix.name:
        raise DataError(
            "This names no dataset.",
            found=prefix,
            expected="a path without .bin or .idx, such as data/x_text_document",
        )
    return prefix.with_name(prefix.name + ending)


@dataclass(frozen=True)
class Header:
    """The first 34 bytes of an `.idx`, and what the sizes of both files say.

    Attributes:
        dtype: Of the tokens in `.bin`.
        sequences: S.
        document_bounds: D, documents + 1.
        bin_bytes: Size of `.bin`.
        has_modes: A mode per sequence follows the document bounds.
    """

    dtype: np.dtype
    sequences: int
    document_bounds: int
    bin_bytes: int
    has_modes: bool

    @property
    def num_tokens(self) -> int:
        """Tokens in `.bin`."""
        return self.bin_bytes // self.dtype.itemsize


def read_header(prefix: str | os.PathLike[str] | S3Path) -> Header:
    """Read and check an index's header against the sizes of both files; costs one small read.

    Raises:
        DataError: A file is missing, is no index, has an unknown version or dtype, or has an impossible size.
        EnvironmentProblem: A file cannot be read.
    """
    return open_tokens(prefix)[0]


def open_tokens(prefix: str | os.PathLike[str] | S3Path) -> tuple[Header, Blob]:
    """As `read_header`, and the `.bin` that the header was checked against, open.

    Raises:
        DataError: As `read_header`.
        EnvironmentProblem: As `read_header`.
    """
    idx, binary = idx_path(place(prefix)), bin_path(place(prefix))
    index, tokens = open_if_there(idx), open_if_there(binary)
    if index is None or tokens is None:
        raise _half(idx, binary, index is not None, tokens is not None)
    raw = bytearray(min(HEADER.size, index.size))
    index.read_into(0, memoryview(raw))
    index.close()
    return _checked_header(idx, binary, bytes(raw), index.size, tokens.size), tokens


def _half(idx: Place, binary: Place, has_idx: bool, has_binary: bool) -> DataError:
    missing, other, has_other = (binary, idx, has_idx) if has_idx else (idx, binary, has_binary)
    return DataError(
        "An indexed dataset lacks one of its two files.",
        where=missing,
        found="no such file" + (f", though {other.name} is there" if has_other else ""),
        expected="PREFIX.bin and PREFIX.idx side by side",
        do="give the path without .bin or .idx; if writing was cut short, write the dataset again",
    )


def _checked_header(idx: Place, binary: Place, raw: bytes, idx_bytes: int, bin_bytes: int) -> Header:
    if raw[: len(MAGIC)] != MAGIC:
        raise damaged("This is not a Megatron index.", idx, (0, 9), raw[:9], MAGIC)
    if len(raw) < HEADER.size:
        raise damaged("An index ends inside its header.", idx, (0, 34), f"{len(raw)} bytes", "34 bytes")
    _, version, code, sequences, bounds = HEADER.unpack(raw)
    if version != VERSION:
        raise damaged("An index has an unknown version.", idx, (9, 17), version, VERSION)
    if code not in _DTYPES:
        raise damaged("An index has an unknown dtype code.", idx, (17, 18), code, "1 to 8")
    plain = HEADER.size + 12 * sequences + 8 * bounds
    if idx_bytes not in (plain, plain + sequences):
        expected = f"{plain:,} bytes (or {plain + sequences:,} with modes) for {sequences:,} sequences and "
        raise damaged(
            "An index's counts do not match its size.",
            idx,
            (18, 34),
            f"a file of {idx_bytes:,} bytes",
            f"{expected}{bounds:,} document bounds",
        )
    dtype = _DTYPES[code]
    if bin_bytes % dtype.itemsize:
        raise damaged(
            "A token file ends inside a token.",
            binary,
            (bin_bytes - bin_bytes % dtype.itemsize, bin_bytes),
            f"{bin_bytes:,} bytes",
            f"a multiple of {dtype.itemsize} ({dtype.name})",
        )
    return Header(dtype, sequences, bounds, bin_bytes, has_modes=sequences > 0 and idx_bytes != plain)


def map_tokens(prefix: str | os.PathLike[str], header: Header) -> np.ndarray:
    """Map a whole local `.bin` without copying it: [num_tokens] of the header's dtype, read-only.

    Raises:
        DataError: The file no longer has the size that the header was checked against.
        EnvironmentProblem: The file cannot be mapped.
    """
    path = bin_path(Path(prefix))
    buffer = _map(path)
    if len(buffer) != header.bin_bytes:
        raise damaged(
            "A token file changed while it was opened.",
            path,
            (0, len(buffer)),
            f"{len(buffer):,} bytes",
            f"{header.bin_bytes:,} bytes",
        )
    return np.frombuffer(buffer, dtype=header.dtype)


class IndexedDataset:
    """A `.bin`/`.idx` pair. Local files are memory-mapped: what it returns are views of them, never copies.

    Of a pair in S3 the index is read into memory, and tokens are read by range.

    Args:
        prefix: Path, or `s3://bucket/key`, without `.bin` or `.idx`.

    Raises:
        DataError: A file is missing or damaged, or the two do not belong together.
        EnvironmentProblem: A file cannot be read.
    """

    def __init__(self, prefix: str | os.PathLike[str] | S3Path) -> None:
        self.prefix: Place = place(prefix)
        header = read_header(self.prefix)
        self._idx, self._bin = idx_path(self.prefix), bin_path(self.prefix)
        S, D = header.sequences, header.document_bounds
        self._pointers_at, self._documents_at = HEADER.size + 4 * S, HEADER.size + 12 * S
        index = read_all(self._idx) if isinstance(self._idx, S3Path) else _map(self._idx)
        self.dtype, self.num_tokens = header.dtype, header.num_tokens
        self.sequence_lengths = np.frombuffer(index, "<i4", S, HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", S, self._pointers_at)
        self.document_indices = np.frombuffer(index, "<i8", D, self._documents_at)
        self._check_sequences(header)
        self._check_documents()
        self._mapped = None if isinstance(self.prefix, S3Path) else map_tokens(self.prefix, header)
        self._blob = open_blob(self._bin) if isinstance(self._bin, S3Path) else None

    def __len__(self) -> int:
        """Sequences in the file."""
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """The tokens of one sequence, [length] of `dtype`.

        Raises:
            IndexError: There is no such sequence.
        """
        i = operator.index(sequence)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"{self.prefix} has {len(self):,} sequences; asked for number {sequence:,}")
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self.tokens(start, int(self.sequence_lengths[i]))

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token `start` on, whatever sequences they lie in: [count] of `dtype`.

        Raises:
            DataError: The range is not wholly inside the file.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise DataError(
                "A read goes past the end of a token file.",
                where=f"{self._bin}, tokens {start:,} to {start + count:,}",
                found=f"{self.num_tokens:,} tokens",
            )
        if self._mapped is not None:
            return self._mapped[start : start + count]
        read = np.empty(count, self.dtype)
        if self._blob is not None and count:
            self._blob.read_into(start * self.dtype.itemsize, read.data.cast("B"))
        return read

    def _check_sequences(self, header: Header) -> None:
        # In blocks, so that an index of a billion sequences is never copied as a whole.
        itemsize, end = self.dtype.itemsize, 0
        for first in range(0, len(self), _BLOCK):
            lengths = self.sequence_lengths[first : first + _BLOCK].astype(np.int64)
            if len(bad := np.flatnonzero(lengths < 0)):
                i = first + int(bad[0])
                at = HEADER.size + 4 * i
                raise damaged(
                    f"Sequence {i:,} has a negative length.",
                    self._idx,
                    (at, at + 4),
                    lengths[bad[0]],
                    "0 or more",
                )
            ends = end + np.cumsum(lengths) * itemsize
            starts = ends - lengths * itemsize
            pointers = self._pointers[first : first + _BLOCK]
            if len(bad := np.flatnonzero(pointers != starts)):
                i, at = first + int(bad[0]), self._pointers_at + 8 * (first + int(bad[0]))
                raise damaged(
                    f"Sequence {i:,} does not begin where the one before it ends.",
                    self._idx,
                    (at, at + 8),
                    f"byte offset {pointers[bad[0]]}",
                    f"byte offset {starts[bad[0]]}",
                )
            end = int(ends[-1])
        if end != header.bin_bytes:
            raise damaged(
                "An index and its token file do not belong together, or one of them was cut.",
                self._bin,
                (min(end, header.bin_bytes), max(end, header.bin_bytes)),
                f"{header.bin_bytes:,} bytes",
                f"{end:,} bytes, the sum of the lengths in {self._idx.name}",
            )

    def _check_documents(self) -> None:
        bounds, at = self.document_indices, self._documents_at
        if len(bounds) == 0 or bounds[0] != 0:
            found = "no bounds" if len(bounds) == 0 else bounds[0]
            raise damaged("The first document bound is wrong.", self._idx, (at, at + 8), found, 0)
        if bounds[-1] != len(self):
            last = at + 8 * (len(bounds) - 1)
            raise damaged(
                "The last document bound is not the number of sequences.",
                self._idx,
                (last, last + 8),
                bounds[-1],
                len(self),
            )
        for first in range(0, len(bounds) - 1, _BLOCK):
            block = bounds[first : first + _BLOCK + 1]
            if len(bad := np.flatnonzero(block[1:] < block[:-1])):
                i = int(bad[0])
                here = at + 8 * (first + i + 1)
                raise damaged(
                    f"Document {first + i:,} ends before it begins.",
                    self._idx,
                    (here, here + 8),
                    block[i + 1],
                    f"{block[i]} or more",
                )


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            # An empty file cannot be mapped, and has nothing to map.
            return (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if os.fstat(file.fileno()).st_size
                else b""
            )
    except OSError as error:
        raise EnvironmentProblem(
            "A dataset file cannot be mapped.", where=path, found=error.strerror
        ) from error


def damaged(what: str, path: Place, span: tuple[int, int], found: object, expected: object) -> DataError:
    """A dataset's file is not what its format says.

    Args:
        what: One sentence: what is wrong.
        path: The file.
        span: First byte and the byte after the last, of what is wrong.
        found: What is there.
        expected: What should be there.
    """
    return DataError(
        what,
        where=f"{path}, bytes {span[0]:,} to {span[1]:,}",
        found=found,
        expected=expected,
        do="restore the file from where it came, or write the dataset again",
    )
