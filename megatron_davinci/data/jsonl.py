"""A document out of one record: a line of JSON, or a row of a table. Each fault is named by file and line.

Lines are parsed by orjson (https://github.com/ijl/orjson) where it is installed. It takes fewer lines than Python's
parser does (no NaN, no half of a surrogate pair); what it refuses is given to the latter, which takes it or says
why not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_davinci.errors import DataError

_fast_loads: Callable[[bytes], Any] | None
try:
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = None


class Fields(NamedTuple):
    """What a record's fields are called.

    Attributes:
        text: The field of plain text.
        prompt: The field of a question; None if there are no questions and answers.
        response: The field of its answer; None likewise.
    """

    text: str = "text"
    prompt: str | None = None
    response: str | None = None

    @property
    def names(self) -> list[str]:
        """Those that are there."""
        return [name for name in self if name is not None]


class Document(NamedTuple):
    """One document.

    Attributes:
        text: The text, or the prompt.
        response: The answer to the prompt; None for plain text.
    """

    text: str
    response: str | None = None


def document_of(
    content: bytes | dict[str, Any], fields: Fields, where: str, numbers: bool = False
) -> Document:
    """The document in a line or row.

    A record that has a prompt or a response is a question with its answer, and must have both; its text field is not
    looked at. Any other is plain text.

    Args:
        content: The line's bytes, or the row's values by column; a null is no value.
        fields: The fields' names.
        where: File and line, for the message.
        numbers: Whether the prompt may be a number, as a label is; it is taken as it is written.

    Raises:
        DataError: It is not UTF-8, not a JSON object, lacks a field, or holds something there that is not a string
            of Unicode characters.
    """
    if isinstance(content, bytes):
        record = _fast(content)
        # Half a surrogate pair is what orjson refuses, so that its strings need not be looked through for one.
        if record is None:
            record = _parsed(content, where)
        elif fields.prompt is None and type(text := record.get(fields.text)) is str:
            return Document(text)
    else:
        record = content
    if fields.prompt is None or fields.response is None:
        return Document(_string(record, fields.text, where))
    if not _has(record, fields.prompt) and not _has(record, fields.response):
        return Document(_string(record, fields.text, where))
    prompt = (_number(record, fields.prompt) if numbers else None) or _string(record, fields.prompt, where)
    response = _string(record, fields.response, where)
    if not response:
        raise DataError(
            "An answer is empty.",
            where=where,
            found=f"{fields.response!r} = ''",
            expected="at least one character",
        )
    return Document(prompt, response)


def _fast(line: bytes) -> dict[str, Any] | None:
    """The record in a line, if orjson is there, and takes it."""
    if _fast_loads is None:
        return None
    try:
        record = _fast_loads(line)
    except ValueError:
        return None  # what is wrong is said by the other parser, if anything is
    return record if isinstance(record, dict) else None


def _parsed(line: bytes, where: str) -> dict[str, Any]:
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
    return record


def _holder(record: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """The object that a field would stand in, and its name there: of `labels.quality` the object `labels`."""
    while field not in record and isinstance(record.get(field.partition(".")[0]), dict):
        record, field = record[field.partition(".")[0]], field.partition(".")[2]
    return record, field


def _has(record: dict[str, Any], field: str) -> bool:
    holder, name = _holder(record, field)
    return name in holder


def _number(record: dict[str, Any], field: str) -> str | None:
    """A number as it is written; None for anything else, which a boolean is too."""
    holder, name = _holder(record, field)
    value = holder.get(name)
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _string(record: dict[str, Any], field: str, where: str) -> str:
    holder, name = _holder(record, field)
    if name not in holder:
        raise DataError(
            f"A document has no field {field!r}.",
            where=where,
            found="the fields " + (", ".join(sorted(map(repr, record))) or "none"),
            expected=repr(field),
            do="name the field that holds the text"
            + (
                ", or those of question and answer by --prompt-field and --response-field"
                if {"prompt", "response"} <= record.keys()
                else ""
            ),
        )
    text = holder[name]
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"The field {field!r} of a document is not UTF-8.",
                where=where,
                found=f"byte 0x{text[error.start]:02x} at byte {error.start + 1}",
                expected="UTF-8 text",
            ) from error
    if not isinstance(text, str):
        raise DataError(
            f"The field {field!r} of a document is not a string.",
            where=where,
            found=f"{type(text).__name__} {_short(json.dumps(text, default=str).encode())}",
            expected="a string",
        )
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The field {field!r} of a document holds half a surrogate pair.",
            where=where,
            found=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
            expected="Unicode characters",
        ) from error
    return text


def _short(line: bytes, limit: int = 60) -> str:
    text = line[: 4 * limit].decode("utf-8", "replace").strip()
    return text if len(text) <= limit else text[:limit] + "..."
