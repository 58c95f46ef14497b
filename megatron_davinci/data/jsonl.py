"""Documents out of JSON-lines files, one at a time, each fault named by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_davinci.errors import DataError


class Line(NamedTuple):
    """One document: its text, and how many bytes of its file have been read when it is handed out."""

    text: str
    number: int
    bytes_read: int


def read_texts(path: Path, text_field: str = "text") -> Iterator[Line]:
    """The text of each line's JSON object; blank lines are passed over. Memory is that of the longest line.

    Raises:
        DataError: The file cannot be opened, or a line is not UTF-8, not a JSON object, lacks `text_field`, or
            holds something there that is not a string of Unicode characters.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError("A JSONL file cannot be read.", where=path, found=error.strerror) from error
    with file:
        bytes_read = 0
        for number, line in enumerate(file, start=1):
            bytes_read += len(line)
            if not line.isspace():
                yield Line(_text_of(line, text_field, f"{path}:{number}"), number, bytes_read)


def _text_of(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            "A line is not UTF-8.",
            where=where,
            found=f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line",
            expected="UTF-8 text",
            do="convert the file, for example with iconv",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            "A line is not JSON.", where=where, found=_short(line), expected=f"one JSON object ({error})"
        ) from error
    if not isinstance(record, dict):
        raise DataError("A line is not a JSON object.", where=where, found=_short(line), expected="{...}")
    if text_field not in record:
        raise DataError(
            f"A document has no field {text_field!r}.",
            where=where,
            found="the fields " + ", ".join(sorted(map(repr, record))),
            expected=repr(text_field),
            do="name the field that holds the text",
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"The field {text_field!r} of a document is not a string.",
            where=where,
            found=f"{type(text).__name__} {_short(json.dumps(text).encode())}",
            expected="a string",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The field {text_field!r} of a document holds half a surrogate pair.",
            where=where,
            found=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
            expected="Unicode characters",
        ) from error
    return text


def _short(line: bytes, limit: int = 60) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= limit else text[:limit] + "..."
