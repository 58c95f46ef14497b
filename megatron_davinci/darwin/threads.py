"""Level 0: threads out of a `Posts.xml` of the Stack Exchange dumps (or of a site that gives its posts in that form).

A post is a line, and a question's answers stand anywhere behind it, so a file is read twice: once for who belongs to
whom and where each line lies, once for the threads, a few lines at a time. A thread is the rows of its posts as they
are; `extract_thread` makes text of them.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_davinci.darwin.raw import Raw
from megatron_davinci.darwin.streams import Unreadable, lines, opened

_ATTRIBUTE = re.compile(rb'\b(Id|ParentId|PostTypeId)="(\d{1,18})"')
_ANSWER = 2
_ROW = np.dtype([("thread", "<i8"), ("answer", "<i8"), ("first", "<i8"), ("bytes", "<i8")])
_BLOCK = 1 << 20


def read_threads(path: Path, name: str, origin: dict[str, Any], limit: int) -> Iterator[Raw]:
    """Every thread, by its question's number; lines that are no posts, and answers without a question, with a fault.

    Args:
        path: The file, compressed or not.
        name: What documents are named by: `NAME#NUMBER`.
        origin: What the documents' origin begins with.
        limit: The most bytes that a thread may have.
    """
    try:
        with _seekable(path) as file:
            rows = array("q")  # a dump has tens of millions of them
            for number, line in enumerate(lines(file, limit)):
                row = _row(line.content, line.first, line.size)
                if isinstance(row, str):
                    place = origin | {"first": line.first, "bytes": line.size}
                    fault = "too_large" if line.content is None else "no_post"
                    yield Raw("", f"{name}#line{number}", place, fault=fault, said=row)
                elif row is not None:
                    rows.extend(row)
            found = np.sort(np.frombuffer(rows, _ROW), kind="stable")
            yield from _threads(file, found, name, origin, limit)
    except Unreadable as fault:
        yield Raw("", f"{name}#rest", origin, fault=fault.reason, said=fault.said)


def read_thread_at(path: Path, name: str, origin: dict[str, Any]) -> Raw | None:
    """A thread once more."""
    with _seekable(path) as file:
        return Raw(_text(file, origin["rows"]), name, origin, encoding="utf-8")


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes, as a file in which one can go back: a plain file itself, another unpacked aside."""
    with opened(path) as file:
        if isinstance(getattr(file, "raw", None), io.FileIO):
            yield file
            return
        with tempfile.TemporaryFile() as aside:
            shutil.copyfileobj(file, aside, _BLOCK)
            aside.seek(0)
            yield aside


def _row(line: bytes | None, first: int, size: int) -> tuple[int, int, int, int] | str | None:
    """The thread of a post, its own number if it is an answer, and its place; None for the file's frame."""
    if line is None:
        return f"a line of {size:,} bytes"
    stripped = line.strip().removeprefix(b"\xef\xbb\xbf")
    if not stripped or stripped.startswith((b"<?xml", b"<posts", b"</posts")):
        return None
    if not (stripped.startswith(b"<row ") and stripped.endswith(b"/>")):
        return "neither a row nor the file's frame"
    found = dict(_ATTRIBUTE.findall(stripped))
    if b"Id" not in found:
        return "a row without an Id"
    own = int(found[b"Id"])
    if int(found.get(b"PostTypeId", b"1")) == _ANSWER:
        return (
            (int(found[b"ParentId"]), own, first, size)
            if b"ParentId" in found
            else "an answer without a ParentId"
        )
    return own, -1, first, size


def _threads(file: IO[bytes], rows: Any, name: str, origin: dict[str, Any], limit: int) -> Iterator[Raw]:
    breaks = np.nonzero(np.diff(rows["thread"]))[0] + 1
    for posts in np.split(rows, breaks) if len(rows) else []:
        number = int(posts["thread"][0])
        places = posts[["first", "bytes"]].tolist()
        place = origin | {"rows": [list(each) for each in places]}
        own, size = f"{name}#{number}", int(posts["bytes"].sum())
        if int(posts["answer"][0]) != -1:
            yield Raw(
                "", own, place, fault="no_question", said=f"{len(posts)} answers to a post that is not there"
            )
        elif size > limit:
            yield Raw("", own, place, fault="too_large", said=f"a thread of {size:,} bytes")
        else:
            try:
                yield Raw(_text(file, places), own, place, encoding="utf-8")
            except UnicodeDecodeError as error:
                yield Raw("", own, place, fault="not_utf8", said=str(error))


def _text(file: IO[bytes], places: Any) -> str:
    found = []
    for first, size in places:
        file.seek(first)
        found.append(file.read(size).decode("utf-8").strip())
    return "\n".join(found)
