"""Text files as inputs: what they are, where they can be parted, and their records one at a time.

JSON lines, plain or compressed by gzip or Zstandard, and Parquet. What a file is its first bytes say. A plain file is
parted into byte ranges and a Parquet file into row groups, so that several processes read it; a compressed one has to
be read from its beginning, and is one piece.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import stat
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megatron_davinci.data import parquet
from megatron_davinci.data.jsonl import Document, Fields, document_of
from megatron_davinci.data.patterns import matching
from megatron_davinci.errors import DataError, EnvironmentProblem

PIECE_BYTES = 16 << 20
LONGEST_LINE = 512 << 20

Kind = Literal["jsonl", "gzip", "zstd", "parquet"]
_MAGIC: dict[bytes, Kind] = {b"\x1f\x8b": "gzip", b"PAR1": "parquet"}
_ENDINGS: dict[str, Kind] = {".gz": "gzip", ".zst": "zstd", ".parquet": "parquet"}
_BLOCK = 1 << 20
_ZSTD_WINDOW = (
    1 << 31
)  # the largest that `zstd --long=31` writes; the library's own limit is a sixteenth of it


class Piece(NamedTuple):
    """A part of an input, read by one process.

    Attributes:
        path: The file.
        kind: What it is.
        first: The first byte; of Parquet, the first row group.
        end: One past the last.
        size: Bytes of the file that it stands for, for progress.
    """

    path: str
    kind: Kind
    first: int
    end: int
    size: int


class FileEndsEarly(DataError):
    """What follows in the file, or in a row group of it, cannot be read, and nobody knows what records those are."""

    rest = "rest_of_file"


class GroupEndsEarly(FileEndsEarly):
    """What follows in a row group cannot be read; the groups behind it can."""

    rest = "rest_of_row_group"


class Record(NamedTuple):
    """A line or row that has not been looked into.

    Attributes:
        number: Of the line or row, in its piece, from 1 on.
        content: The line's bytes, the row's values, or a fault.
        done: Bytes of the piece that have been read.
    """

    number: int
    content: bytes | dict[str, Any] | DataError
    done: int


def find(patterns: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths and patterns (`text/*.jsonl.gz`, `**` for any folders) name, each pattern's by name.

    Raises:
        DataError: A pattern names no file, or a path is not that of a file.
    """
    files: list[Path] = []
    for given in patterns:
        pattern = os.fspath(given)
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            found = [Path(pattern)]
        else:
            found = [Path(name) for name in matching(pattern)]
        if not found:
            raise DataError("A pattern names no file.", where=pattern, do="check the path")
        files += found
    for file in files:
        if problem := _no_file(file):
            raise DataError(
                "An input cannot be read.",
                where=file,
                found=problem,
                expected="a file of JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) or Parquet",
            )
    return files


def _no_file(path: Path) -> str | None:
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror


def pieces_of(path: Path, fields: Fields, piece_bytes: int | None = None) -> list[Piece]:
    """The pieces of a file, in order.

    Args:
        path: The file.
        fields: What its records' fields are called; Parquet is asked whether it has them.
        piece_bytes: A piece's size, where the file can be parted. Default: `PIECE_BYTES`.

    Raises:
        DataError: The file cannot be read, is cut short in its header, or lacks a column.
        EnvironmentProblem: The library that reads it is not installed.
    """
    piece_bytes = piece_bytes or PIECE_BYTES
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(4)
    kind: Kind = (
        "zstd" if is_zstd(start) else next((k for m, k in _MAGIC.items() if start.startswith(m)), "jsonl")
    )
    expected = _ENDINGS.get(path.suffix.lower())
    if expected is not None and kind != expected:
        raise DataError(
            f"A file is not what its ending says: {expected}.",
            where=path,
            found=f"{size:,} bytes that begin with {start!r}" if size else "an empty file",
            do="copy or make it again",
        )
    name = os.fspath(path)
    if kind == "zstd":
        _zstandard()
    if kind == "parquet":
        groups = parquet.row_groups(path, fields.names, required=fields.prompt is None)
        return [
            Piece(name, kind, first, end, nbytes) for first, end, nbytes in groups.runs(piece_bytes, size)
        ]
    if kind != "jsonl":
        return [Piece(name, kind, 0, size, size)]
    count = -(-size // piece_bytes)
    bounds = [size * n // count for n in range(count)] + [size] if count else []
    return [Piece(name, kind, first, end, end - first) for first, end in pairwise(bounds)]


def is_zstd(start: bytes) -> bool:
    """Whether a file that begins with these four bytes is Zstandard's.

    It may begin with a frame to be skipped (RFC 8878, section 3.1.2), as all do that pzstd writes.
    """
    return start == b"\x28\xb5\x2f\xfd" or (start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The records of a piece. Memory is that of the longest line, or of a thousand rows.

    A line belongs to the piece that its first byte lies in. Blank lines are passed over, and counted; so is a
    byte-order mark before the first, and not counted.

    Yields:
        Records; one may hold a fault: a line of more than `LONGEST_LINE` bytes, a row group that is damaged (the
        piece goes on with the next), or, as the last, compressed data that ends too early.

    Raises:
        DataError: The file cannot be opened.
    """
    if piece.kind == "parquet":
        yield from _rows(piece, fields)
        return
    with _open(Path(piece.path)) as file:
        if piece.kind == "jsonl":
            yield from _range(file, piece)
        else:
            yield from _stream(file, piece)


def _range(file: IO[bytes], piece: Piece) -> Iterator[Record]:
    position = piece.first
    if position:
        # The line that the byte before lies in is the piece's before; if that byte ends it, nothing is passed over.
        file.seek(position - 1)
        # No further than the piece: what is one line through many pieces would be read to its end by each of them.
        position += _pass_over(file, piece.end - position + 1) - 1
    number = 0
    while position < piece.end:
        line, length = _line(file)
        if not length:
            break
        position += length
        number += 1
        if number == 1 and not piece.first:
            line = _without_mark(line)
        if not _is_blank(line):
            yield Record(number, line, min(position, piece.end) - piece.first)


def _stream(file: IO[bytes], piece: Piece) -> Iterator[Record]:
    zstd = _zstandard() if piece.kind == "zstd" else None
    faults: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if zstd is not None:
        faults = (EOFError, zstd.ZstdError)
    text: IO[bytes] = (
        gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
        if zstd is None
        else io.BufferedReader(ZstdStream(file, zstd), _BLOCK)
    )
    number = 0
    while True:
        try:
            line, length = _line(text)
        except faults as error:
            yield Record(
                number + 1,
                FileEndsEarly(
                    "A compressed file is cut short or damaged.",
                    where=piece.path,
                    found=f"{error} (byte {file.tell():,} of {piece.size:,}, after {number:,} lines)",
                    do="copy it again",
                ),
                piece.size,
            )
            return
        if not length:
            return
        number += 1
        if number == 1:
            line = _without_mark(line)
        if not _is_blank(line):
            yield Record(number, line, min(file.tell(), piece.size))


def _rows(piece: Piece, fields: Fields) -> Iterator[Record]:
    path, groups = Path(piece.path), piece.end - piece.first
    before = 0
    for group in range(piece.first, piece.end):
        done = piece.size * (group - piece.first + 1) // groups
        number = before
        before += parquet.rows_in(path, group)
        try:
            for row in parquet.read_rows(path, group, fields.names):
                number += 1
                yield Record(number, _without_nulls(row), done)
        except DataError as error:
            early = GroupEndsEarly(
                error.what, where=error.where, found=error.found, expected=error.expected, do=error.do
            )
            yield Record(number + 1, early, done)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The values that a row has. A column's objects all have the same fields, null where one has no value."""
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in row.items()
        if value is not None
    }


def _without_mark(line: bytes | DataError) -> bytes | DataError:
    """The first line of a file without the byte-order mark that some programs write before it."""
    return line.removeprefix(BOM_UTF8) if isinstance(line, bytes) else line


def _is_blank(line: bytes | DataError) -> bool:
    # A mark with nothing behind it leaves nothing at all, which `isspace` calls no space.
    return line == b"" or (isinstance(line, bytes) and line.isspace())


def _line(file: IO[bytes]) -> tuple[bytes | DataError, int]:
    """The next line and how long it is; one that is too long is passed over, and a fault stands for it."""
    line = file.readline(LONGEST_LINE + 1)
    if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
        return line, len(line)
    length = len(line)
    del line
    length += _pass_over(file)
    return (
        DataError(
            "A line is too long.",
            found=f"{length:,} bytes",
            expected=f"at most {LONGEST_LINE:,} bytes",
            do="part the document, or look whether the file has line breaks",
        ),
        length,
    )


def _pass_over(file: IO[bytes], most: int = 1 << 62) -> int:
    """Read to the end of the line, or `most` bytes; returns how many bytes that was."""
    length = 0
    while block := file.readline(min(_BLOCK, most - length)):
        length += len(block)
        if block.endswith(b"\n"):
            break
    return length


def read_documents(path: Path, fields: Fields, numbers: bool = False) -> Iterator[Document]:
    """The documents of a whole file in order, empty ones too.

    Args:
        path: The file.
        fields: What its records' fields are called.
        numbers: Whether a prompt may be a number.

    Raises:
        DataError: The file or a record is bad; the error names it.
    """
    before = 0
    for piece in pieces_of(path, fields, piece_bytes=1 << 62):
        number = 0
        for record in read(piece, fields):
            number = record.number
            if isinstance(record.content, DataError):
                raise record.content
            yield document_of(record.content, fields, f"{path}:{before + number}", numbers)
        before += number


def lines_before(piece: Piece) -> int:
    """Lines of a plain file before a piece; rows of a Parquet file likewise."""
    if piece.kind == "parquet":
        return parquet.rows_before(Path(piece.path), piece.first)
    # The line that reaches into the piece, or ends right before it, is not the piece's.
    return count_line_ends(Path(piece.path), 0, piece.first - 1) + 1 if piece.first else 0


def count_line_ends(path: Path, first: int, end: int) -> int:
    """Line ends among bytes `first` to before `end` of a file."""
    lines = 0
    with _open(path) as file:
        file.seek(first)
        while first < end and (block := file.read(min(_BLOCK, end - first))):
            lines += block.count(b"\n")
            first += len(block)
    return lines


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=_BLOCK)
    except OSError as error:
        raise DataError("An input cannot be read.", where=path, found=error.strerror) from error


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise EnvironmentProblem(
            "Reading .zst files needs the package zstandard.",
            found=error,
            do="pip install 'megatron-davinci[data]'",
        ) from error
    return zstandard


class ZstdStream(io.RawIOBase):
    """The decompressed bytes of Zstandard frames; unlike the library's reader it tells when the last is cut short."""

    def __init__(self, file: IO[bytes], library: Any) -> None:
        self._file, self._library = file, library
        self._frame: Any = None
        self._rest = b""  # compressed
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end."""
        while not self._text:
            block = self._rest or self._file.read(1 << 17)
            self._rest = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                decompressor = self._library.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
                self._frame = decompressor.decompressobj()
            self._text = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def close(self) -> None:
        """Let go of the decompressor; the file is its opener's."""
        self._frame = None
        with suppress(ValueError):
            super().close()
