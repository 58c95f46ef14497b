"""What is read of one document, and text out of bytes whose encoding nobody has said."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress
from typing import Any, NamedTuple

from megatron_davinci.darwin.streams import Unreadable

_DECLARED = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9._-]+)""", re.IGNORECASE
)
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
# What browsers read under a name (WHATWG Encoding, section 4.2): the wider encoding that pages are written in.
_READ_AS = {
    "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874", "gb2312": "gb18030",
    "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs",
}  # fmt: skip
_QUOTES = {byte: mark for byte in range(0x80, 0xA0) if (mark := bytes([byte]).decode("cp1252", "ignore"))}
_SHIFTS = (b"\x1b$", b"\x1b(")  # of ISO 2022, whose bytes are all ASCII


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


def decode(content: bytes, markup: bool = False, header: str | None = None) -> tuple[str, str]:
    """Text out of bytes whose encoding nobody has said: by its mark, as UTF-8, as declared, or as it looks.

    Args:
        content: All of the document.
        markup: Whether a declaration in HTML counts.
        header: What the server declared; its word goes before the page's.

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
    declared = _DECLARED.search(content[:4096]) if markup else None
    named = [each for each in (header, declared and declared[1].decode("ascii")) if each]
    if any(shift in content for shift in _SHIFTS):
        for encoding in named:
            if encoding.lower().startswith("iso-2022-"):
                with suppress(LookupError, Unreadable):
                    return _strictly(content, encoding)
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        damage = f"byte 0x{content[error.start]:02x} at byte {error.start + 1}"
    for encoding in named:
        try:
            return _as_declared(content, encoding)
        except (LookupError, ValueError, Unreadable):
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


def _as_declared(content: bytes, encoding: str) -> tuple[str, str]:
    wider = _READ_AS.get(codecs.lookup(encoding).name)
    if wider == "cp1252":  # which lacks five bytes, and pages do not
        return content.decode("latin-1").translate(_QUOTES), wider
    if wider is not None:
        with suppress(Unreadable):
            return _strictly(content, wider)
    return _strictly(content, encoding)


def _strictly(content: bytes, encoding: str) -> tuple[str, str]:
    try:
        return content.decode(encoding), encoding.lower()
    except (UnicodeDecodeError, UnicodeError) as error:
        raise Unreadable("unknown_encoding", error) from error
