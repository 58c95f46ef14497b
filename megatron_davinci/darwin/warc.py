"""Level 0: documents out of WARC files (ISO 28500), as Common Crawl and `davinci data fetch` write them.

Read by FastWARC. A record is a document, with its place in the file, the page's address and the date. What is no
document (requests, descriptions of the crawl) is passed over; what is one and cannot be used (another media type, a
page of an error) comes out with its fault. After a member of a compressed file that is damaged, reading goes on with
the next that is whole.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_davinci.darwin.raw import Raw, decode
from megatron_davinci.darwin.streams import Unreadable

_MEMBER = b"\x1f\x8b\x08"
_RECORD = b"WARC/1."
_BLOCK = 1 << 20
_HEAD = 4096  # bytes in which a record's header most often ends
# What a media type is read as; the step that makes text of it goes by this.
MEDIA = {
    "text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "text/markdown": "text",
    "application/pdf": "pdf", "application/x-ipynb+json": "notebook", "application/x-tex": "latex",
    "text/x-tex": "latex",
}  # fmt: skip

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")  # RFC 9112, 7.1


def read_warc(path: Path, name: str, origin: dict[str, Any], limit: int) -> Iterator[Raw]:
    """Every document of a WARC file, compressed or not.

    Args:
        path: The file.
        name: What documents are named by: `NAME#OFFSET`, or `NAME#OFFSET.N` for the Nth behind that in one member.
        origin: What the documents' origin begins with.
        limit: The most bytes that a record may have.
    """
    origin = origin | {"container": "warc"}
    try:
        with path.open("rb") as file:
            at: int | None = 0
            while at is not None:
                at = yield from _until_damage(file, at, name, origin, limit)
    except OSError as error:
        yield Raw("", f"{name}#rest", origin, fault="unreadable_file", said=str(error.strerror or error))


def read_warc_at(path: Path, name: str, origin: dict[str, Any], limit: int) -> Raw | None:
    """The document of an origin once more; None if there is no such record at its offset."""
    from fastwarc.warc import ArchiveIterator

    base = {key: origin[key] for key in ("path", "container")} | {"format": "warc"}
    with path.open("rb") as file:
        file.seek(origin["first"])
        for record in ArchiveIterator(file, parse_http=False):
            if record.record_id == origin.get("record"):
                return _document(record, origin["first"], 0, name, base, limit)
    return None


def _until_damage(
    file: IO[bytes], begin: int, name: str, origin: dict[str, Any], limit: int
) -> Generator[Raw, None, int | None]:
    """Documents from an offset on; returns where to go on after damage, None at the end."""
    from fastwarc.warc import ArchiveIterator

    size = file.seek(0, 2)
    last: int | None = None
    first, within = begin, 0
    packed = _starts(file, begin, _MEMBER)
    file.seek(begin)
    said = "the file ends within a record"
    try:
        for record in ArchiveIterator(file, parse_http=False):
            last = record.stream_pos
            if packed and not _begins(file, last, record):
                # Of a file that was compressed as a whole, where the library knows no place of its own for it.
                within += 1
            else:
                first, within = last, 0
            if (raw := _document(record, first, within, name, origin, limit)) is not None:
                yield raw
    except OSError as error:
        said = str(error)
        damaged = begin if last is None else (_end(file, last) or last)
    else:
        # A beginning of a record that breaks off before its block is no error to the library.
        damaged = begin if last is None else (_end(file, last) or size)
        if damaged >= size:
            return None
    following = _member(file, damaged + 1)
    while following is not None and _end_of_member(file, following) is None:
        following = _member(file, following + 1)
    lost = (size if following is None else following) - damaged
    fault = "broken_gzip" if _starts(file, 0, _MEMBER) else "broken_warc"
    place = origin | {"first": damaged, "bytes": lost}
    yield Raw("", f"{name}#{damaged}-damaged", place, fault=fault, said=f"{said}; {lost:,} bytes")
    return following


def _begins(file: IO[bytes], at: int, record: Any) -> bool:
    """Whether a compressed member begins at an offset with this record."""
    try:
        head = zlib.decompressobj(31).decompress(os.pread(file.fileno(), _HEAD, at), _HEAD)
    except zlib.error:
        return False
    header, end, _ = head.partition(b"\r\n\r\n")
    return head.startswith(_RECORD) and (not end or (record.record_id or "").encode() in header)


def _starts(file: IO[bytes], at: int, mark: bytes) -> bool:
    file.seek(at)
    return file.read(len(mark)) == mark


def _member(file: IO[bytes], begin: int) -> int | None:
    """The next offset at which a compressed member may begin."""
    file.seek(begin)
    at, rest = begin, b""
    while block := file.read(_BLOCK):
        found = (rest + block).find(_MEMBER)
        if found >= 0:
            return at - len(rest) + found
        at += len(block)
        rest = (rest + block)[-len(_MEMBER) + 1 :]
    return None


def _end(file: IO[bytes], at: int) -> int | None:
    """Where a record that has been read ends, with the blank lines behind it; None if it is cut off."""
    if _starts(file, at, _MEMBER):
        return _end_of_member(file, at)
    left = file.seek(0, 2) - at
    file.seek(at)
    size = -1
    while (line := file.readline(_BLOCK)).strip():
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            size = int(value) if value.strip().isdigit() and len(value.strip()) < 20 else -1
    if not line or not 0 <= size <= left:
        return None
    file.seek(size, 1)
    end = file.tell()
    while (line := file.readline(_BLOCK)) in (b"\r\n", b"\n"):
        end = file.tell()
    return end


def _end_of_member(file: IO[bytes], at: int) -> int | None:
    """Where the compressed member that begins here ends; None if it is not whole, or holds no WARC record."""
    file.seek(at)
    unpack, head = zlib.decompressobj(31), b""
    try:
        while block := file.read(_BLOCK):
            at += len(block)
            while block and not unpack.eof:
                piece = unpack.decompress(block, _BLOCK)
                head = (head + piece[: len(_RECORD)])[: len(_RECORD)]
                if not _RECORD.startswith(head):
                    return None
                block = unpack.unconsumed_tail
            if unpack.eof:
                return at - len(unpack.unused_data)
    except zlib.error:
        pass
    return None


def _document(
    record: Any, first: int, within: int, name: str, origin: dict[str, Any], limit: int
) -> Raw | None:
    """A record as a document, the `within`-th behind the one that begins at `first`; None for one that is none."""
    from fastwarc.warc import WarcRecordType

    size, headers, kind = record.content_length, record.headers, record.record_type
    name = f"{name}#{first}" + (f".{within}" if within else "")
    if headers.get("WARC-Type") is None or headers.get("Content-Length") is None:
        place = origin | {"first": first}
        return Raw("", name, place, fault="broken_record", said="its header breaks off")
    if kind not in (WarcRecordType.response, WarcRecordType.resource, WarcRecordType.conversion):
        return None
    url = headers.get("WARC-Target-URI")
    if url and url.startswith("<") and url.endswith(">"):  # as wget writes it, by the grammar of WARC 1.0
        url = url[1:-1]
    fields = {"url": url, "date": headers.get("WARC-Date")}
    origin = origin | {"record": record.record_id, "first": first, "bytes": size}

    def faulty(fault: str, said: str) -> Raw:
        return Raw("", name, origin, fields, fault=fault, said=said)

    if size > limit:
        return faulty("too_large", f"a record of {size:,} bytes")
    block = record.reader.read(size)
    if len(block) < size:
        return faulty("broken_record", f"{len(block):,} of {size:,} bytes are there")
    media, encoding = (headers.get("Content-Type") or "").split(";")[0].strip().lower(), None
    if kind == WarcRecordType.response:
        if not media.startswith("application/http"):
            return faulty("not_http", f"the record's type is {media or 'not given'}")
        try:
            answer, block = _answer(block, limit)
        except (OSError, ValueError) as error:
            return faulty("broken_http", str(error))
        status, media = answer.http_headers.status_code, (answer.http_content_type or "").lower()
        encoding = answer.http_charset
        if status != 200:
            return faulty("http_status", f"status {status}")
        if len(block) > limit:
            return faulty("too_large", f"more than {limit:,} bytes when unpacked")
    media = headers.get("WARC-Identified-Payload-Type") or media
    format_ = MEDIA.get(media.split(";")[0].strip().lower())
    if format_ is None and not media:
        format_ = "html" if b"<html" in block[:2000].lower() else "text"
    if format_ is None:
        return faulty("other_media", f"the media type is {media}")
    origin["format"] = format_
    if format_ == "pdf":
        return Raw(block.decode("latin-1"), name, origin, fields, encoding="bytes")
    try:
        text, encoding = decode(block, markup=format_ == "html", header=encoding)
    except Unreadable as fault:
        return faulty(fault.reason, fault.said)
    return Raw(text, name, origin, fields, encoding=encoding)


def _answer(block: bytes, limit: int) -> tuple[Any, bytes]:
    """An HTTP answer, and its body as it was before it was packed.

    Archives also hold bodies that are unpacked already, under headers that still say how they were packed: those are
    taken as they are.

    Args:
        block: The answer, as it was sent.
        limit: The most bytes that the body may have; of a longer one, one byte more comes back.

    Raises:
        OSError: Its headers are none, or its body is packed and cannot be unpacked.
    """
    try:
        answer = _parsed(block, "all")
        return answer, answer.reader.read(limit + 1)
    except OSError:
        answer = _parsed(block, "none")
        body = _unpacked(answer.reader.read(len(block)), dict(answer.http_headers.astuples()), limit)
        if body is None:
            raise
        return answer, body


def _parsed(block: bytes, decoded: str) -> Any:
    from fastwarc.warc import WarcRecord

    # A record of its own: behind one of the iterator's whose body has failed, nothing more can be read.
    record = WarcRecord()
    record.is_http = True
    record.set_bytes_content(block)
    record.parse_http(quirks_mode=True, auto_decode=decoded)
    if record.http_headers is None:
        raise OSError("no status line")
    return record


def _unpacked(body: bytes, headers: dict[str, str], limit: int) -> bytes | None:
    """A body that the library cannot unpack by its headers; None where it is what they say, and broken."""
    said = {name.lower(): value.lower() for name, value in headers.items()}
    if "chunked" in said.get("transfer-encoding", "") and _CHUNK.match(body):
        joined = _joined(body)
        if joined is None:
            return None
        body = joined
    packing = said.get("content-encoding", "")
    ways = (
        [31]
        if body.startswith(_MEMBER[:2])
        else [zlib.MAX_WBITS, -zlib.MAX_WBITS]
        if "deflate" in packing
        else []
    )
    for bits in ways:  # a deflate without its header is not what the name stands for, and sent none the less
        unpack = zlib.decompressobj(bits)
        try:
            found = unpack.decompress(body, limit + 1)
        except zlib.error:
            continue
        if unpack.eof or len(found) > limit:
            return found
    return None if ways == [31] else body


def _joined(body: bytes) -> bytes | None:
    """The chunks of a body; None where it breaks off."""
    parts, at = list[bytes](), 0
    while head := _CHUNK.match(body, at):
        size, at = int(head[1], 16), head.end()
        if size == 0:
            return b"".join(parts)
        parts.append(body[at : at + size])
        at += size
        at += 2 if body.startswith(b"\r\n", at) else 1
    return None
