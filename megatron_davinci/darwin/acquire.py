"""Level 0: documents out of files. Nothing is judged; what cannot be read comes out too, to be quarantined.

Each document knows its raw bytes: the file, and the first byte and the number of bytes of its line in the
decompressed file, or the row of a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_davinci.darwin.inventory import InputFile
from megatron_davinci.darwin.raw import Raw, decode
from megatron_davinci.darwin.recipe import SourceRecipe
from megatron_davinci.darwin.streams import Unreadable, lines, opened, whole
from megatron_davinci.darwin.threads import read_thread_at, read_threads
from megatron_davinci.darwin.warc import read_warc, read_warc_at

VERSION = 7


def read_file(file: InputFile, source: SourceRecipe, limit: int) -> Iterator[Raw]:
    """Every document of a file; what cannot be read is one more, with its fault.

    Args:
        file: The file.
        source: What the recipe says of its source.
        limit: The most bytes that a document may have.
    """
    path, origin = Path(file.path), {"path": file.path, "format": file.format}
    readers = {"jsonl": _jsonl, "parquet": _table, "arrow": _table}
    if file.format == "warc":
        found = read_warc(path, file.name, origin, limit)
    elif file.format == "thread":
        found = read_threads(path, file.name, origin, limit)
    else:
        found = readers.get(file.format, _whole_file)(path, file.name, origin, source, limit)
    if file.about is None:
        yield from found
        return
    for raw in found:
        fields = (raw.fields or {}) | file.about.get("fields", {})
        yield raw._replace(fields=fields or None, licence=raw.licence or file.about.get("licence"))


def read_raw(origin: dict[str, Any], source: SourceRecipe, limit: int) -> Raw | None:
    """One document once more, by its origin; None if there is nothing at that place any more."""
    path = Path(origin["path"])
    try:
        if origin.get("container") == "warc":
            return read_warc_at(path, "", origin, limit)
        if "rows" in origin:
            return read_thread_at(path, "", origin)
        for raw in read_file(InputFile(source.name, origin["path"], "", origin["format"], 0), source, limit):
            if raw.origin == origin:
                return raw
    except (OSError, Unreadable, UnicodeDecodeError):
        return None
    return None


def _whole_file(
    path: Path, name: str, origin: dict[str, Any], source: SourceRecipe, limit: int
) -> Iterator[Raw]:
    try:
        with opened(path) as file:
            content = whole(file, limit)
    except Unreadable as fault:
        yield Raw("", name, origin, fault=fault.reason, said=fault.said)
        return
    origin = origin | {"first": 0, "bytes": len(content)}
    if origin["format"] == "pdf":  # its bytes are the characters, until `extract_pdf` makes text of them
        yield Raw(content.decode("latin-1"), name, origin, encoding="bytes")
        return
    try:
        text, encoding = decode(content, markup=origin["format"] == "html")
    except Unreadable as fault:
        yield Raw("", name, origin, fault=fault.reason, said=fault.said)
        return
    yield Raw(text, name, origin, encoding=encoding)


def _jsonl(path: Path, name: str, origin: dict[str, Any], source: SourceRecipe, limit: int) -> Iterator[Raw]:
    row = 0
    try:
        with opened(path) as file:
            for line in lines(file, limit):
                if line.content is not None and not line.content.strip():
                    continue
                place = origin | {"row": row, "first": line.first, "bytes": line.size}
                yield _line(line.content, f"{name}#{row}", place, source)
                row += 1
    except Unreadable as fault:
        rest = origin | {"row": row}
        yield Raw("", f"{name}#{row}-rest", rest, fault=fault.reason, said=f"from row {row} on: {fault.said}")


def _line(content: bytes | None, name: str, origin: dict[str, Any], source: SourceRecipe) -> Raw:
    if content is None:
        return Raw("", name, origin, fault="too_large", said=f"a line of {origin['bytes']:,} bytes")
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        said = f"byte 0x{content[error.start]:02x} at byte {error.start + 1} of the line"
        return Raw("", name, origin, fault="not_utf8", said=said)
    except (ValueError, RecursionError) as error:
        return Raw("", name, origin, fault="not_json", said=str(error))
    if not isinstance(record, dict):
        return Raw("", name, origin, fault="not_json", said=f"a {type(record).__name__}, not an object")
    return _record(record, name, origin, source)


def _record(record: dict[str, Any], name: str, origin: dict[str, Any], source: SourceRecipe) -> Raw:
    text = record.pop(source.text_field, None)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Raw("", name, origin, fault="not_utf8", said=str(error))
    if not isinstance(text, str):
        found = "nothing" if text is None else type(text).__name__
        return Raw("", name, origin, fault="no_text", said=f"the field {source.text_field!r} holds {found}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return Raw("", name, origin, fault="half_surrogate", said="half a surrogate pair in the text")
    if source.id_field is not None:
        given = record.pop(source.id_field, None)
        if not isinstance(given, str | int) or given == "":
            return Raw("", name, origin, fault="no_id", said=f"the field {source.id_field!r}: {given!r}")
        name = str(given)
    licence = record.pop(source.licence_field, None) if source.licence_field else None
    return Raw(text, name, origin, record or None, _licence(licence), "utf-8")


def _licence(given: Any) -> str | None:
    """A licence as a record names it; of several, a text may be used only under all."""
    if not isinstance(given, list):
        return None if given is None else str(given)
    names = [str(name) for name in given if name]
    return " AND ".join(f"({name})" if " or " in name.lower() else name for name in names) or None


def _table(path: Path, name: str, origin: dict[str, Any], source: SourceRecipe, limit: int) -> Iterator[Raw]:
    import pyarrow

    row = 0
    try:
        for record in _rows(path, origin["format"]):
            place, row = origin | {"row": row}, row + 1
            text = record.get(source.text_field)
            if isinstance(text, str | bytes) and len(text) > limit:
                said = f"{len(text):,} characters"
                yield Raw("", f"{name}#{place['row']}", place, fault="too_large", said=said)
            else:
                yield _record(record, f"{name}#{place['row']}", place, source)
    # A date of the year 150,000 overflows Python's.
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        fault = f"broken_{origin['format']}"
        yield Raw(
            "", f"{name}#{row}-rest", origin | {"row": row}, fault=fault, said=f"from row {row} on: {error}"
        )


def _rows(path: Path, format_: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if format_ == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        return
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as reader:
        _check_names(reader.schema.names)
        for batch in reader:
            for begin in range(0, batch.num_rows, 256):
                yield from batch.slice(begin, 256).to_pylist()


def _check_names(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"more than one column {twice!r}")
