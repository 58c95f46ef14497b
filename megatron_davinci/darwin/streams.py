"""Bytes of a file, decompressed as they are read; what is broken or too large is said, never half taken."""

from __future__ import annotations

import gzip
import io
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from megatron_davinci.data.text_inputs import ZstdStream, is_zstd

_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b"


class Unreadable(Exception):
    """Why a file, or what is left of it, cannot be read: one of few fixed words, and what the library said."""

    def __init__(self, reason: str, said: object = "") -> None:
        super().__init__(reason, str(said))
        self.reason, self.said = reason, str(said)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by what its first bytes say.

    Raises:
        Unreadable: It cannot be opened, or the compression breaks off, at the first read that sees it.
    """
    reason = "unreadable_file"
    try:
        with path.open("rb", buffering=_BLOCK) as raw:
            magic = raw.read(4)
            raw.seek(0)
            if magic.startswith(_GZIP):
                reason = "broken_gzip"
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file  # type: ignore[misc]
            elif is_zstd(magic):
                import zstandard

                reason = "broken_zstd"
                yield io.BufferedReader(ZstdStream(raw, zstandard), _BLOCK)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Unreadable(reason, error) from error
    except OSError as error:
        raise Unreadable("unreadable_file", error.strerror or error) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise Unreadable(reason, error) from error
        raise


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        content: Its bytes without the end; None where it is longer than was allowed.
        first: The position of its first byte, in the decompressed file.
        size: Bytes, the end included.
    """

    content: bytes | None
    first: int
    size: int


def lines(file: IO[bytes], limit: int) -> Iterator[Line]:
    """The lines of a file; one that is longer than `limit` bytes is passed over without being kept.

    A byte-order mark before the first is none of its content.
    """
    first = 0
    while line := file.readline(limit + 1):
        size = len(line)
        content: bytes | None = (line if first else line.removeprefix(BOM_UTF8)).rstrip(b"\r\n")
        if size > limit and not line.endswith(b"\n"):
            content = None
            while rest := file.readline(_BLOCK):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield Line(content, first, size)
        first += size


def whole(file: IO[bytes], limit: int) -> bytes:
    """All of a file.

    Raises:
        Unreadable: It has more than `limit` bytes.
    """
    parts: list[bytes] = []
    have = 0
    while block := file.read(min(_BLOCK, limit + 1 - have)):
        parts.append(block)
        have += len(block)
        if have > limit:
            raise Unreadable("too_large", f"more than {limit:,} bytes")
    return b"".join(parts)
