"""Parts: what one process has made of one piece of the input, kept until it is in a shard.

Part `n` of a job is files in the job's folder, all named `NNNNNNN`: `.ids` (tokens, in the shards' dtype), `.ends`
(int64, where each document ends in them), `.loss` (uint8 a token, where the job has a mask), `.bad` (a JSON line for
each record that could not be read) and `.json`, which is written last and says that the part is whole.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors

_BUFFER = 1 << 20


@dataclass(frozen=True)
class PartRecord:
    """What a part holds.

    Attributes:
        documents: Documents.
        tokens: Their tokens, ends included.
        empty: Records whose text is empty, which are no documents.
        bad: Records that could not be read.
        checksums: CRC-32 of each file, by ending.
        pairs: Documents that are a question with its answer; None where they were not counted.
    """

    documents: int
    tokens: int
    empty: int
    bad: int
    checksums: dict[str, int]
    pairs: int | None = None


class PartWriter:
    """Writes a part; it is one when the block has ended well.

    Args:
        folder: Where the job keeps its parts.
        number: The part's.
        dtype: The tokens'.
        mask: Whether tokens have loss flags.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype, mask: bool) -> None:
        self._folder, self._number, self._dtype, self._mask = folder, number, dtype, mask
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._checksums: dict[str, int] = {}
        self._documents = self._tokens = self._bad = 0
        self.empty = self.pairs = 0

    def __enter__(self) -> PartWriter:
        """Make the files, over those of an earlier attempt."""
        path = part_path(self._folder, self._number, "json")
        with disk_errors(path, "writing a part"):
            path.unlink(missing_ok=True)
            for ending in ("ids", "ends", "bad", *(["loss"] if self._mask else [])):
                path = part_path(self._folder, self._number, ending)
                # A new file, so that a worker of a killed job that is not quite dead writes into the old one.
                path.unlink(missing_ok=True)
                file = open(path, "xb", buffering=_BUFFER)
                self._files[ending] = self._stack.enter_context(file)
                self._checksums[ending] = 0
        return self

    def add(
        self, tokens: NDArray[Any], lengths: NDArray[np.int64], loss: NDArray[np.uint8] | None = None
    ) -> None:
        """Append documents.

        Args:
            tokens: [n] in the part's dtype, ends of documents included.
            lengths: [documents], tokens of each.
            loss: [n] of 0 and 1, where the part has a mask.
        """
        ends = self._tokens + np.cumsum(lengths, dtype=np.int64)
        self._write("ids", tokens.data.cast("B") if len(tokens) else b"")
        self._write("ends", ends.tobytes())
        if self._mask:
            self._write("loss", (np.ones(len(tokens), np.uint8) if loss is None else loss).tobytes())
        self._tokens += len(tokens)
        self._documents += len(lengths)

    def add_bad(
        self,
        number: int,
        error: DataError,
        content: bytes | dict[str, Any] | None,
        *,
        rest: str | None = None,
    ) -> None:
        """Keep a record that could not be read.

        Args:
            number: Its line or row in the piece.
            error: Why.
            content: The record, or None where there is none.
            rest: What it stands for beside itself, as the quarantine calls it: `rest_of_file`, `rest_of_row_group`.
        """
        self._bad += 1
        reason = error.what + (f" Found: {' '.join(str(error.found).split())}" if error.found else "")
        line: dict[str, Any] = {"line": number, "reason": reason}
        if rest is not None:
            line[rest] = True
        if isinstance(content, bytes):
            try:
                line["content"] = content.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                line["content_base64"] = base64.b64encode(content).decode()
        elif content is not None:
            line["content"] = json.dumps(content, default=repr)
        self._write("bad", json.dumps(line).encode() + b"\n")

    def _write(self, ending: str, data: Any) -> None:
        self._checksums[ending] = zlib.crc32(data, self._checksums[ending])
        with disk_errors(part_path(self._folder, self._number, ending), "writing a part"):
            self._files[ending].write(data)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close the files and write the record, unless the block raised."""
        path = part_path(self._folder, self._number, "json")
        with disk_errors(path, "writing a part"):
            self._stack.close()
        if kind is None:
            self.record = PartRecord(
                self._documents, self._tokens, self.empty, self._bad, dict(self._checksums), self.pairs
            )
            # Without waiting for the disk: if the machine dies and the part is torn, its checksums say so.
            temporary = path.with_suffix(f".{os.getpid()}")
            with disk_errors(path, "writing a part"):
                temporary.write_text(json.dumps(asdict(self.record)))
                os.replace(temporary, path)


def part_path(folder: Path, number: int, ending: str) -> Path:
    """One of a part's files."""
    return folder / f"{number:07d}.{ending}"


def read_record(folder: Path, number: int) -> PartRecord | None:
    """What a part holds; None where it is not whole.

    Its small files are held against their checksums, and its tokens where they still are (see `has_tokens`), so
    that a part which a crash of the machine has torn is none.
    """
    try:
        record = PartRecord(**json.loads(part_path(folder, number, "json").read_bytes()))
        for ending, checksum in record.checksums.items():
            path = part_path(folder, number, ending)
            if ending in ("ids", "loss") and not path.exists():
                continue
            if _checksum(path) != checksum:
                return None
    except (OSError, ValueError, TypeError):
        return None
    return record


def has_tokens(folder: Path, number: int, record: PartRecord) -> bool:
    """Whether a part's tokens are there still."""
    return all(part_path(folder, number, ending).exists() for ending in record.checksums)


def drop_tokens(folder: Path, number: int) -> None:
    """Remove a part's tokens, which are in shards now."""
    for ending in ("ids", "loss"):
        part_path(folder, number, ending).unlink(missing_ok=True)


def drop(folder: Path, number: int) -> None:
    """Remove a part, its record first."""
    for ending in ("json", "ids", "loss", "ends", "bad"):
        part_path(folder, number, ending).unlink(missing_ok=True)


def read_ends(folder: Path, number: int) -> NDArray[np.int64]:
    """Where each document ends in a part's tokens: [documents] int64."""
    return np.fromfile(part_path(folder, number, "ends"), np.int64)


def read_bad(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """The records of a part that could not be read."""
    with open(part_path(folder, number, "bad"), "rb") as file:
        for line in file:
            yield json.loads(line)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BUFFER):
            checksum = zlib.crc32(block, checksum)
    return checksum
