"""Level 0: documents out of files. Nothing is judged; what cannot be read comes out too, to be quarantined.

Each document knows its raw bytes: the file, and the first byte and the number of bytes of its line in the
decompressed file, or the row of a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.darwin.inventory import InputFile
from megatron_davinci.darwin.recipe import SourceRecipe
from megatron_davinci.darwin.streams import Unreadable, lines, opened, whole

VERSION = 1
_DECLARED = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9._-]+)""", re.IGNORECASE
)
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Raw(NamedTuple):
    """What was read of one document.

    Attributes:
        text: Its text; empty where there is a fault.
        name: Within the source.
        origin: The raw bytes' place: `path`, `format`, and `first`, `bytes` or `row`.
        fields: What else the record had.
        licence: The record's own.
        encoding: That the bytes were decoded from.
        fault: Why it cannot be processed; one of few fixed words.
        said: What the reader said of it.
    """

    text: str
    name: str
    origin: dict[str, Any]
    fields: dict[str, Any] | None = None
    licence: str | None = None
    encoding: str | None = None
    fault: str | None = None
    said: str = ""


def read_file(file: InputFile, source: SourceRecipe, limit: int) -> Iterator[Raw]:
    """Every document of a file; what cannot be read is one more, with its fault.

    Args:
        file: The file.
        source: What the recipe says of its source.
        limit: The most bytes that a document may have.
    """
    readers = {"jsonl": _jsonl, "parquet": _parquet}
    origin = {"path": file.path, "format": file.format}
    yield from readers.get(file.format, _whole_file)(Path(file.path), file.name, origin, source, limit)


def read_raw(origin: dict[str, Any], source: SourceRecipe, limit: int) -> Raw | None:
    """One document once more, by its origin; None if there is nothing at that place any more."""
    file = InputFile(source.name, origin["path"], "", origin["format"], 0)
    try:
        for raw in read_file(file, source, limit):
            if raw.origin == origin:
                return raw
    except OSError:
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
    try:
        text, encoding = decode(content, markup=origin["format"] == "html")
    except Unreadable as fault:
        yield Raw("", name, origin, fault=fault.reason, said=fault.said)
        return
    yield Raw(text, name, origin, encoding=encoding)


def decode(content: bytes, markup: bool = False) -> tuple[str, str]:
    """Text out of bytes whose encoding nobody has said: by its mark, as UTF-8, as declared, or as it looks.

    Args:
        content: All of the document.
        markup: Whether a declaration in HTML counts.

    Returns:
        The text, and the encoding.

    Raises:
        Unreadable: The bytes are no text, or of no encoding that can be told.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _strictly(content, encoding)
    if b"\0" in content[:8192]:
        raise Unreadable("binary", "a zero byte")
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        damage = f"byte 0x{content[error.start]:02x} at byte {error.start + 1}"
    if markup and (declared := _DECLARED.search(content[:4096])):
        try:
            return _strictly(content, declared[1].decode("ascii"))
        except (LookupError, Unreadable):
            pass  # a declaration that is wrong counts as none
    from resiliparse.parse.encoding import detect_encoding

    guessed = detect_encoding(content, html5_compatible=False)
    if guessed and guessed.lower().replace("-", "") not in ("utf8", "ascii"):
        try:
            text, encoding = _strictly(content, guessed)
        except (LookupError, Unreadable):
            pass
        else:
            # The 1-byte encodings take any bytes; those of a picture give many control characters.
            odd = sum((ord(c) < 32 and c not in "\t\n\r\f") or 0x7F <= ord(c) < 0xA0 for c in text[:20000])
            if odd * 50 <= len(text[:20000]):
                return text, encoding
    raise Unreadable("unknown_encoding", damage)


def _strictly(content: bytes, encoding: str) -> tuple[str, str]:
    try:
        return content.decode(encoding), encoding.lower()
    except (UnicodeDecodeError, UnicodeError) as error:
        raise Unreadable("unknown_encoding", error) from error


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
    return Raw(text, name, origin, record or None, str(licence) if licence is not None else None, "utf-8")


def _parquet(
    path: Path, name: str, origin: dict[str, Any], source: SourceRecipe, limit: int
) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    place, row = origin | {"row": row}, row + 1
                    text = record.get(source.text_field)
                    if isinstance(text, str | bytes) and len(text) > limit:
                        yield Raw(
                            "",
                            f"{name}#{place['row']}",
                            place,
                            fault="too_large",
                            said=f"{len(text):,} characters",
                        )
                    else:
                        yield _record(record, f"{name}#{place['row']}", place, source)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        rest = origin | {"row": row}
        yield Raw("", f"{name}#{row}-rest", rest, fault="broken_parquet", said=f"from row {row} on: {error}")
