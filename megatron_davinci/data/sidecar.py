"""Where each sequence of a source is from: `shard-NNNNN.prov.parquet`, row i for sequence i of the shard's index.

It is written where the documents that are tokenised know their origin (`davinci data run` made them); Megatron-Core
does not look at it. Packed sequences hold pieces of several documents, and have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.data import text_inputs
from megatron_davinci.data.jsonl import Fields, document_of
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.permutation import Permutation, round_keys
from megatron_davinci.data.text_inputs import Piece
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors, in_utf8

_ROWS = 1 << 14  # of a row group, which a look-up reads
_COLUMNS = ("id", "source", "licence", "level", "path", "format", "row", "first", "bytes", "corpus")


class _Wide(Fields):
    """The fields of a document, and those that say where it is from."""

    @property
    def names(self) -> list[str]:
        """Columns that a table is asked for."""
        return [*super().names, "id", "source", "licence", "darwin"]


def sidecar_path(prefix: Path) -> Path:
    """The sidecar of the shard of this path, which ends in neither `.bin` nor `.idx`."""
    return prefix.with_name(f"{prefix.name}.prov.parquet")


def write_sidecars(
    folder: Path, manifest: Manifest, pieces: Sequence[Piece], fields: Fields, shuffle: int | None
) -> bool:
    """Write a sidecar for each shard, if the first document knows its origin.

    Args:
        folder: Where the shards lie.
        manifest: Of the source.
        pieces: The input, in order.
        fields: What its records' fields are called.
        shuffle: The seed of the documents' order; None where it is that of the input. A shuffled source's rows are
            all in memory at once.

    Returns:
        Whether there are sidecars.

    Raises:
        DataError: The documents of the input are not those of the shards.
        EnvironmentProblem: The disk is full or failing.
    """
    rows = _rows(pieces, _Wide(*fields))
    first = next(rows, None)
    if first is None or first["path"] is None:
        return False
    schema = _schema(_COLUMNS)
    rows = _chain(first, rows)
    if shuffle is not None:
        rows = _shuffled(list(rows), len(manifest.shards), shuffle)
    for shard in manifest.shards:
        path = sidecar_path(folder / shard.prefix)
        with disk_errors(path, "writing where documents are from"):
            _write(path, schema, rows, shard.documents)
    if next(rows, None) is not None:
        raise _other_documents(folder)
    return True


def _schema(columns: Sequence[str]) -> Any:
    import pyarrow

    types = {"level": pyarrow.int8(), **dict.fromkeys(("row", "first", "bytes"), pyarrow.int64())}
    return pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in columns])


def write_rows(prefix: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the sidecar of a shard whose sequences may be groups of documents.

    Args:
        prefix: The shard, without `.bin` or `.idx`.
        rows: One for each sequence: what `origin_of` gives; of a group that of its first document, and as `members`
            the JSON of all of its documents' rows, each with its `tokens`.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """
    path, listed = sidecar_path(prefix), list(rows)
    with disk_errors(path, "writing where documents are from"):
        _write(path, _schema((*_COLUMNS, "members")), iter(listed), len(listed))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a sidecar, in order.

    Raises:
        DataError: It is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError("A sidecar is damaged.", where=path, found=error, do="tokenise the source again")


def _write(path: Path, schema: Any, rows: Iterator[dict[str, Any]], count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    with open(path, "wb") as file:
        with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            while count:
                batch = list(islice(rows, min(count, _ROWS)))
                if len(batch) != min(count, _ROWS):
                    raise _other_documents(path)
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                count -= len(batch)
        file.flush()
        os.fsync(file.fileno())


def _other_documents(where: Path) -> DataError:
    return DataError(
        "The input's documents are not those of the shards.",
        where=where,
        expected="the files that were tokenised, unchanged",
        do="begin anew with --restart",
    )


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _shuffled(rows: list[dict[str, Any]], shards: int, seed: int) -> Iterator[dict[str, Any]]:
    """In the order that the assembler writes them: of shard after shard, whose bounds join."""
    permutation = Permutation(len(rows), round_keys(seed, "documents", 0))
    for low in range(0, len(rows), _ROWS):
        for place in permutation.many(np.arange(low, min(low + _ROWS, len(rows)))).tolist():
            yield rows[place]


def _rows(pieces: Sequence[Piece], fields: _Wide) -> Iterator[dict[str, Any]]:
    """A row for each record that is a document of the source, as `encode_part` takes them."""
    for piece in pieces:
        corpus = _corpus_of(piece.path)
        for record in text_inputs.read(piece, fields):
            if isinstance(record.content, DataError):
                continue
            try:
                document = document_of(record.content, fields, "")
            except DataError:
                continue
            if document.text or document.response is not None:
                yield _row(record.content, corpus)


def _row(content: bytes | dict[str, Any], corpus: str | None) -> dict[str, Any]:
    record = _object(content.decode()) if isinstance(content, bytes) else content
    darwin = _object(record.get("darwin"))
    if not darwin:
        return dict.fromkeys(_COLUMNS)
    origin = _object(darwin.get("origin"))
    return {
        **{name: _text(record.get(name)) for name in ("id", "source", "licence")},
        "level": _number(darwin.get("level"), 7),
        **{name: _text(origin.get(name)) for name in ("path", "format")},
        **{name: _number(origin.get(name), 63) for name in ("row", "first", "bytes")},
        "corpus": corpus,
    }


def _object(value: Any) -> dict[str, Any]:
    """An object, also one written as JSON, as lines and tables have it; empty for anything else.

    Others may have fields of these names too, and mean by them what they like. A line may be nested more deeply than
    this parser goes: the one that read its text goes further.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    """As a column of texts takes it."""
    if value is None:
        return None
    return in_utf8(value if isinstance(value, str) else json.dumps(value, default=repr))


def _number(value: Any, bits: int) -> int | None:
    """As a column of whole numbers takes it."""
    return value if type(value) is int and -(1 << bits) <= value < 1 << bits else None


@lru_cache(maxsize=1024)
def _corpus_of(path: str) -> str | None:
    """The corpus that a file of documents belongs to."""
    for folder in Path(os.path.abspath(path)).parents[:4]:
        if (folder / "corpus.json").is_file():
            return str(folder)
    return None


def origin_of(prefix: Path, sequence: int) -> dict[str, Any] | None:
    """Where a sequence of a shard is from.

    Args:
        prefix: The shard, without `.bin` or `.idx`.
        sequence: Its number in the shard, from 0 on.

    Returns:
        `id`, `source`, `licence`, `level`, the raw file's `path` and `format`, the place in it (`first` and `bytes`
        of the decompressed file, or `row`), and the `corpus` folder; None where there is no sidecar.

    Raises:
        DataError: The sidecar is damaged.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if sequence < count:
                    found: dict[str, Any] = file.read_row_group(group).slice(sequence, 1).to_pylist()[0]
                    return found
                sequence -= count
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error
    raise DataError(
        "A sidecar has fewer rows than its shard has sequences.", where=path, do="tokenise the source again"
    )


def origins_of(prefix: Path, sequence: int, first: int, end: int) -> list[dict[str, Any]]:
    """Where some tokens of a sequence are from: its document, or those of its group that they lie in.

    Args:
        prefix: The shard, without `.bin` or `.idx`.
        sequence: Its number in the shard, from 0 on.
        first: The first token, in the sequence.
        end: One past the last.

    Returns:
        What `origin_of` gives, for each document in order; empty where there is no sidecar.
    """
    row = origin_of(prefix, sequence)
    if row is None:
        return []
    members = row.pop("members", None)
    if members is None:
        return [row]
    found, at = [], 0
    for member in json.loads(members):
        tokens = member.pop("tokens")
        if at < end and first < at + tokens:
            found.append(member)
        at += tokens
    return found
