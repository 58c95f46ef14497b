"""Files of documents, one a task: written beside, put under their names by one rename, read back in order.

datatrove's writers give a file its final name when they open it, so a crash leaves a part of a file under the name of
the whole. Here a file that has its name is whole. Temporary names are drawn, so that two attempts at a task, one of
which nobody waits for any more, do not write into each other's.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from megatron_davinci.data.text_inputs import ZstdStream
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors, fsync_folder

_ROWS = 1000
_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
# Columns of a table, which others find by name. All tables have all of them; a document that is no pair has nulls.
_PAIR = ("prompt", "response")
_COLUMNS = ("id", "text", "source", "licence", *_PAIR)
TEMPORARY = ".part-"
# How a line ends that orjson cannot write. It could read some of them, but would make floats of large integers.
_SLOWLY = b" \n"


class PartWriter:
    """Records into one file, which gets its name when all are there.

    Args:
        path: Ending in `.jsonl`, `.jsonl.zst` or `.parquet`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, 0
        self._beside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
        with disk_errors(path, f"writing {path.name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._beside, "xb")  # noqa: SIM115
            self._sink: Any = _sink(path.name, self._file)

    def write(self, record: dict[str, Any]) -> None:
        """Add a record."""
        with disk_errors(self.path, f"writing {self.path.name}"):
            self._sink.add(record)
        self.records += 1

    def commit(self) -> None:
        """Put the file under its name, after its content is on disk.

        Raises:
            EnvironmentProblem: The disk is full or fails; nothing lies under the name that did not before.
        """
        with disk_errors(self.path, f"writing {self.path.name}"):
            self._sink.end()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._beside, self.path)
        fsync_folder(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


class Parts:
    """Several files that are committed together, or not at all but for a crash between two renames.

    Use as a context: what is written is committed at its end, and discarded if it ends by an exception.
    """

    def __init__(self) -> None:
        self._writers: dict[Path, PartWriter] = {}

    def __enter__(self) -> Parts:
        return self

    def write(self, path: Path, record: dict[str, Any]) -> None:
        """Add a record to the file of this name."""
        self.open(path).write(record)

    def open(self, path: Path) -> PartWriter:
        """The file of this name; one that nothing is written to is written empty."""
        if path not in self._writers:
            self._writers[path] = PartWriter(path)
        return self._writers[path]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for writer in self._writers.values():
                writer.commit()
        else:
            for writer in self._writers.values():
                writer.discard()


def dump(record: dict[str, Any]) -> bytes:
    """A line of JSON. What JSON has no word for is written as its text."""
    try:
        return orjson.dumps(record, default=str, option=_OPTIONS)
    except TypeError:  # an integer beyond 64 bits, half a surrogate pair, objects in objects 254 times over
        line = json.dumps(record, default=_as_orjson)
    if "NaN" in line or "Infinity" in line:  # numbers that are nulls to orjson, or words of a text
        line = json.dumps(json.loads(line, parse_constant=lambda name: None))
    return line.encode("ascii") + _SLOWLY


def load(line: bytes) -> dict[str, Any]:
    """What `dump` was given, as far as JSON has words for it.

    Raises:
        ValueError: It is no JSON.
    """
    first, second = (json.loads, orjson.loads) if line.endswith(_SLOWLY) else (orjson.loads, json.loads)
    record: dict[str, Any]
    try:
        record = first(line)
    except (ValueError, RecursionError):  # each takes what the other does not
        record = second(line)
    return record


def _as_orjson(value: Any) -> Any:
    """A value that only orjson knows, as it would come back: a date, an array."""
    return orjson.loads(orjson.dumps(value, default=str, option=_OPTIONS))


def _is_unicode(value: Any) -> bool:
    """Whether it is a string, and of whole characters: a table's columns hold no half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.isascii() or value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Lines:
    def __init__(self, file: io.BufferedWriter) -> None:
        self._file: Any = file

    def add(self, record: dict[str, Any]) -> None:
        self._file.write(dump(record))

    def end(self) -> None:
        pass


class _Zstandard(_Lines):
    def __init__(self, file: io.BufferedWriter) -> None:
        import zstandard

        super().__init__(file)
        self._file = zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(file, closefd=False)

    def end(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, file: io.BufferedWriter) -> None:
        import pyarrow
        import pyarrow.parquet

        strings = (*_COLUMNS, "darwin", "rest")
        fields = [(name, pyarrow.large_string() if name == "text" else pyarrow.string()) for name in strings]
        self._schema = pyarrow.schema([*fields, ("level", pyarrow.int8())])
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._arrow, self._rows = pyarrow, list[dict[str, Any]]()

    def add(self, record: dict[str, Any]) -> None:
        rest = dict(record)
        del rest["darwin"]
        # What a column cannot hold stays in the rest, which is laid over the columns when they are read.
        known = {key: rest.pop(key) for key in _COLUMNS if _is_unicode(rest.get(key))}
        known |= {key: rest.pop(key) for key in _COLUMNS if key not in _PAIR and rest.get(key, "") is None}
        darwin = record["darwin"]
        self._rows.append(
            known | {"darwin": dump(darwin).decode(), "rest": dump(rest).decode(), "level": darwin["level"]}
        )
        if len(self._rows) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def end(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


def _sink(name: str, file: io.BufferedWriter) -> Any:
    if name.endswith(".parquet"):
        return _Parquet(file)
    return _Zstandard(file) if name.endswith(".zst") else _Lines(file)


def read_part(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that `PartWriter` wrote.

    Raises:
        DataError: It is damaged.
    """
    for line in lines_of_part(path):
        try:
            yield load(line)
        except ValueError as error:
            raise _damaged(path, error) from error


def lines_of_part(path: Path) -> Iterator[bytes]:
    """Its records as lines of JSON, not looked into.

    Raises:
        DataError: It is damaged.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from map(dump, _read_parquet(path))
            return
        with open(path, "rb") as raw:
            if path.name.endswith(".zst"):
                import zstandard

                yield from io.BufferedReader(ZstdStream(raw, zstandard), 1 << 20)
            else:
                yield from raw
    except Exception as error:
        if isinstance(error, OSError | ValueError | EOFError) or type(error).__name__ == "ZstdError":
            raise _damaged(path, error) from error
        raise


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        "A file of documents is damaged.", where=path, found=error, do="run the recipe with --restart"
    )


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                rest, darwin = json.loads(row.pop("rest")), json.loads(row.pop("darwin"))
                del row["level"]
                for key in _PAIR:
                    if row.get(key, "") is None:
                        del row[key]
                yield row | {"darwin": darwin} | rest


def remove_temporary(folder: Path) -> None:
    """Do away with what attempts that have died left behind."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
