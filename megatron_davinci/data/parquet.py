"""Parquet tables as text: pyarrow, asked for in this file only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.errors import DataError, EnvironmentProblem

_ROWS = 1024


class RowGroups(NamedTuple):
    """A table's row groups: bytes of each, all columns, uncompressed."""

    sizes: tuple[int, ...]

    def runs(self, piece_bytes: int, file_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Runs of row groups of about so many bytes: first, one past the last, their share of the file."""
        first = size = 0
        total = max(1, sum(self.sizes))
        for group, more in enumerate(self.sizes):
            size += more
            if size >= piece_bytes or group + 1 == len(self.sizes):
                yield first, group + 1, file_bytes * size // total
                first, size = group + 1, 0


def row_groups(path: Path, columns: Sequence[str], required: bool) -> RowGroups:
    """The row groups of a table.

    Args:
        path: The file.
        columns: Columns that will be read; `labels.quality` is a field of the column `labels`.
        required: Whether all of them must be there, or at least one.

    Raises:
        DataError: The file is no whole table, lacks a column, or has two of one name.
        EnvironmentProblem: pyarrow is not installed.
    """
    file = _file(path)
    names = file.schema_arrow.names
    missing = [column for column in columns if _column(column, names) not in names]
    if missing and (required or len(missing) == len(columns)):
        raise DataError(
            f"A Parquet file has no column {missing[0]!r}.",
            where=path,
            found="the columns " + ", ".join(map(repr, names)),
            expected=", ".join(map(repr, columns)),
            do="name the column that holds the text",
        )
    twice = [column for column in columns if names.count(_column(column, names)) > 1]
    if twice:
        raise DataError(
            f"A Parquet file has more than one column {_column(twice[0], names)!r}.",
            where=path,
            found="the columns " + ", ".join(map(repr, names)),
            expected="one",
            do="write the table again, with another name for each column",
        )
    metadata = file.metadata
    return RowGroups(tuple(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)))


def read_rows(path: Path, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of one row group, by column.

    Raises:
        DataError: The file is damaged.
    """
    file = _file(path)
    import pyarrow

    names = file.schema_arrow.names
    there = list(dict.fromkeys(column for each in columns if (column := _column(each, names)) in names))
    try:
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=there):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(
            "A Parquet file holds text that is not UTF-8.",
            where=f"{path}, row group {group}",
            found=error,
            do="store the column as binary, so that the bad row can be told apart, or write it again",
        ) from error
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise DataError(
            "A Parquet file is damaged, or holds values that cannot be read.",
            where=f"{path}, row group {group}",
            found=error,
            do="copy it again",
        ) from error


def _column(field: str, names: Sequence[str]) -> str:
    """The column that holds a field: the one of its name, or else the one that the field is in."""
    return field if field in names else field.partition(".")[0]


def rows_before(path: Path, group: int) -> int:
    """Rows in the row groups before one."""
    return sum(rows_in(path, before) for before in range(group))


def rows_in(path: Path, group: int) -> int:
    """Rows in a row group."""
    rows: int = _file(path).metadata.row_group(group).num_rows
    return rows


@lru_cache(maxsize=4)
def _file(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentProblem(
            "Reading Parquet needs the package pyarrow.",
            found=error,
            do="pip install 'megatron-davinci[data]'",
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(
            "A Parquet file is cut short or damaged.", where=path, found=error, do="copy it again"
        ) from error
