"""Which tokens carry loss: one bit a token in `<prefix>.mask`, beside `<prefix>.bin` and `<prefix>.idx`.

| offset | bytes         | content                                                                     |
|--------|---------------|-----------------------------------------------------------------------------|
| 0      | 8             | magic `DVMASK\\x00\\x00`                                                      |
| 8      | 8             | uint64 version, 1                                                           |
| 16     | 8             | uint64 tokens, those of `.bin`                                              |
| 24     | 8             | zeros                                                                       |
| 32     | ceil(tokens/8)| bit `k % 8` (the lowest is 0) of byte `32 + k // 8` is token `k`'s; the rest zeros |

Integers are little-endian. The bit belongs to the token: a position carries loss when the token that it has to
predict has a 1. A window of S + 1 tokens from token `first` on has its S labels' bits at tokens `first + 1` on:

    offset, nbytes = byte_range(first + 1, S)
    blob.read_into(offset, raw)                 # nbytes of the .mask
    unpack(raw, first + 1, S, row)              # row: [S] uint8

The format is this project's own; Megatron-Core passes the file by.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_davinci.data.indexed import P, damaged
from megatron_davinci.data.places import Place
from megatron_davinci.data.storage import open_blob, read_range, size_of
from megatron_davinci.errors import DataError
from megatron_davinci.files import file_digest

MAGIC = b"DVMASK\x00\x00"
VERSION = 1
HEADER = struct.Struct("<8sQQ8s")

_BUFFER = 1 << 20
_BLOCK = 1 << 23  # tokens unpacked at a time


def mask_path(prefix: P) -> P:
    """The mask of a prefix; the prefix may hold dots."""
    return prefix.with_name(prefix.name + ".mask")


def mask_bytes(tokens: int) -> int:
    """The size of the mask of so many tokens, header included."""
    return HEADER.size + (tokens + 7) // 8


def byte_range(start: int, count: int) -> tuple[int, int]:
    """Where in the file the bits of `count` tokens from token `start` on lie: offset and number of bytes."""
    first = start >> 3
    return HEADER.size + first, ((start + count + 7) >> 3) - first


def unpack(raw: bytes | bytearray | memoryview, start: int, count: int, out: npt.NDArray[np.uint8]) -> None:
    """Turn the bytes of `byte_range(start, count)` into one number a token.

    Args:
        raw: Those bytes.
        start: The first token.
        count: Tokens.
        out: [count] uint8, is filled: 1 where the token carries loss, else 0.
    """
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    out[:] = bits[start & 7 : (start & 7) + count]


def read_mask_header(prefix: Place, tokens: int) -> None:
    """Check a mask's header and size; costs one look at the file and one small read.

    Args:
        prefix: The dataset's, without an ending.
        tokens: Tokens in its `.bin`.

    Raises:
        DataError: The mask is missing, is none, has an unknown version, is of another number of tokens, or was
            cut or grew.
        EnvironmentProblem: It cannot be read.
    """
    path = mask_path(prefix)
    size = size_of(path)
    if size is None:
        raise DataError(
            "A dataset lacks its mask.",
            where=path,
            found="no such file",
            expected="PREFIX.mask beside PREFIX.bin",
            do="restore the file; without it tokens would carry loss that should not",
        )
    raw = read_range(path, 0, min(HEADER.size, size))
    if raw[: len(MAGIC)] != MAGIC:
        raise damaged("This is not a loss mask.", path, (0, 8), raw[: len(MAGIC)], MAGIC)
    if len(raw) < HEADER.size:
        raise damaged("A mask ends inside its header.", path, (0, 32), f"{size} bytes", "32 bytes")
    _, version, masked, reserved = HEADER.unpack(raw)
    if version != VERSION:
        raise damaged("A mask has an unknown version.", path, (8, 16), version, VERSION)
    if masked != tokens:
        raise damaged(
            "A mask is of another number of tokens than its token file.",
            path,
            (16, 24),
            f"{masked:,} tokens",
            f"{tokens:,} tokens, those of {prefix.name}.bin",
        )
    if any(reserved):
        raise damaged("Bytes of a mask that have no meaning are set.", path, (24, 32), reserved, bytes(8))
    if size != mask_bytes(tokens):
        raise damaged(
            "A mask has the wrong size.",
            path,
            (min(size, mask_bytes(tokens)), max(size, mask_bytes(tokens))),
            f"{size:,} bytes",
            f"{mask_bytes(tokens):,} bytes for {tokens:,} tokens",
        )


def check_padding(prefix: Place, tokens: int) -> None:
    """Check that the bits after the last token's are zero, as in every mask that was written whole.

    Raises:
        DataError: One of them is set.
        EnvironmentProblem: The mask cannot be read.
    """
    if tokens % 8:
        path, last = mask_path(prefix), mask_bytes(tokens) - 1
        byte = read_range(path, last, 1)[0]
        if byte >> tokens % 8:
            raise damaged(
                "Bits of a mask after its last token are set.",
                path,
                (last, last + 1),
                f"0b{byte:08b}",
                f"zeros above the lowest {tokens % 8} bits",
            )


def mask_blocks(prefix: Path, tokens: int) -> Iterator[npt.NDArray[np.uint8]]:
    """All of a mask in order, in blocks: [up to 2^23] uint8 of 0 and 1.

    Raises:
        DataError: The mask is missing or damaged.
        EnvironmentProblem: It cannot be read.
    """
    read_mask_header(prefix, tokens)
    blob = open_blob(mask_path(prefix))
    for start in range(0, tokens, _BLOCK):
        block = np.empty(min(_BLOCK, tokens - start), np.uint8)
        offset, nbytes = byte_range(start, len(block))
        raw = bytearray(nbytes)
        blob.read_into(offset, memoryview(raw))
        unpack(raw, start, len(block), block)
        yield block
    blob.close()


class MaskWriter:
    """Writes a mask's bits to a file that is not one until `finish`: its header comes last.

    Holds less than a byte's bits and the file's buffer in memory. Its caller removes the file when something
    fails, and renames it when all is well.

    Args:
        path: The file to make.

    Raises:
        OSError: It cannot be made, or (from the methods) written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "xb", buffering=_BUFFER)  # noqa: SIM115 (closed by `finish` or `close`)
        self._file.write(bytes(HEADER.size))
        self._rest = np.empty(0, np.uint8)
        self._tokens = 0

    def add(self, loss: npt.NDArray[np.uint8]) -> None:
        """Append the bits of [n] tokens, each 0 or 1."""
        bits = np.concatenate([self._rest, loss])
        whole = len(bits) & ~7
        self._file.write(np.packbits(bits[:whole], bitorder="little").data)
        self._rest = bits[whole:].copy()
        self._tokens += len(loss)

    def finish(self) -> str:
        """Write the last bits and the header, and wait for the disk.

        Returns:
            Hex SHA-256 of the whole file.
        """
        self._file.write(np.packbits(self._rest, bitorder="little").data)
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._tokens, bytes(8)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return file_digest(self._path)

    def close(self) -> None:
        """Close the file, whatever is in it."""
        self._file.close()


def checked_loss(loss: npt.ArrayLike, tokens: int, where: str) -> npt.NDArray[np.uint8]:
    """A document's loss flags as [tokens] uint8 of 0 and 1.

    Args:
        loss: [tokens] booleans, or integers 0 and 1.
        tokens: Tokens of the document.
        where: The document, for the message.

    Raises:
        DataError: They are of another shape or kind, or one is neither 0 nor 1.
    """
    flags = np.asarray(loss)
    if flags.size == 0 and tokens == 0:
        return np.empty(0, np.uint8)
    if flags.shape != (tokens,) or flags.dtype.kind not in "biu":
        raise DataError(
            "A document's loss flags do not fit its tokens.",
            where=where,
            found=f"{flags.dtype} of shape {list(flags.shape)}",
            expected=f"booleans, or 0 and 1, of shape [{tokens}]",
        )
    if len(bad := np.flatnonzero((flags != 0) & (flags != 1))):
        raise DataError(
            "A loss flag is neither 0 nor 1.",
            where=f"{where}, token {int(bad[0]):,}",
            found=int(flags[bad[0]]),
            expected="0 or 1",
        )
    return flags.astype(np.uint8)
