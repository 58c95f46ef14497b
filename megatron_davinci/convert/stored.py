"""Reading parts of tensors out of a Megatron-Core `torch_dist` checkpoint, in one process, from any layout.

A stored tensor is cut into chunks, as ranks held them, and each is one `torch.save` archive inside a larger file.
Only the rows that are asked for are read, straight to where they are wanted: no tensor need be in memory as a whole.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_davinci.errors import CheckpointError
from megatron_davinci.platform.checkpoint_metadata import SafeReader
from megatron_davinci.platform.safe_pickle import NotPlain, read_plain

# A model with experts has several optimizers, which Megatron-Core chains.
_NO_WEIGHT = re.compile(r"((chained_\d+\.)?optimizer|low_precision)\.")
_BLOCK = 8 * 1024 * 1024
_LOCAL_HEADER = struct.Struct(
    "<26xHH"
)  # of a file in a zip archive; lengths of its name and of what follows it


class _Place(NamedTuple):
    """Where the elements of a chunk lie, row by row."""

    file: int
    start: int
    crc: int


class StoredTensors:
    """The weights of a checkpoint by their stored keys; each is read when it is asked for.

    What is read is held against the CRC-32 that torch wrote beside it.

    Args:
        state: The folder that Megatron-Core wrote.

    Raises:
        CheckpointError: It cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        try:
            said = SafeReader(str(state)).read_metadata()
        except Exception as error:  # whatever reading a damaged file raises
            raise CheckpointError(
                "The checkpoint's .metadata cannot be read.",
                where=state / ".metadata",
                found=error,
                expected="what torch.distributed.checkpoint writes, and nothing else",
                do="copy the checkpoint again; if it names anything else, do not trust where it is from",
            ) from error
        self._all = set(said.state_dict_metadata)
        self._entries = {
            key: entry
            for key, entry in said.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _NO_WEIGHT.match(key)
        }
        self._storage: dict[MetadataIndex, Any] = said.storage_data or {}
        self._files: dict[str, int] = {}
        self._places: dict[MetadataIndex, _Place | Tensor] = {}

    def keys(self) -> set[str]:
        """Stored keys of the weights."""
        return set(self._entries)

    def has(self, prefix: str) -> bool:
        """Whether anything is stored under a name that begins so, weights or not."""
        return any(key.startswith(prefix) for key in self._all)

    def dtype(self, key: str) -> torch.dtype:
        """Of a weight."""
        return self._entries[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a weight; weights of layers have the layers as their first axis."""
        return tuple(self._entries[key].size)

    def nbytes(self, key: str) -> int:
        """Bytes of a weight's elements."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def layer(self, key: str, number: int) -> Tensor:
        """Read one layer of a weight onto the CPU."""
        return self.read(key, number, number + 1)[0]

    def read(self, key: str, first: int = 0, end: int | None = None) -> Tensor:
        """Read a weight, or a part of its first axis, onto the CPU.

        Args:
            key: Its stored key.
            first: Where the part begins.
            end: One past its last; default: the whole rest.

        Raises:
            CheckpointError: A file is damaged, or lacks the weight.
        """
        entry = self._entries[key]
        size = tuple(entry.size)
        end = size[0] if end is None and size else end or 0
        out = torch.empty((end - first, *size[1:]) if size else (), dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            index = MetadataIndex(key, chunk.offsets)
            if not size:
                return self._rows(key, index, sizes, out.dtype, 0, 1).reshape(())
            low, high = max(first, offsets[0]), min(end, offsets[0] + sizes[0])
            if low >= high or 0 in sizes:
                continue
            target = out[low - first : high - first]
            for axis in range(1, len(sizes)):
                target = target.narrow(axis, offsets[axis], sizes[axis])
            rows = (low - offsets[0], high - offsets[0])
            if target.is_contiguous():
                self._read_into(target, key, index, sizes, *rows)
            else:
                target.copy_(self._rows(key, index, sizes, out.dtype, *rows))
            filled += target.numel()
        if filled != out.numel():
            raise CheckpointError(
                "The checkpoint lacks a part of a tensor.",
                where=self.state,
                found=f"{key}: {filled:,} of {out.numel():,} elements",
                do="copy the checkpoint again",
            )
        return out

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _rows(
        self, key: str, index: MetadataIndex, sizes: tuple[int, ...], dtype: torch.dtype, first: int, end: int
    ) -> Tensor:
        rows = torch.empty((end - first, *sizes[1:]), dtype=dtype)
        self._read_into(rows, key, index, sizes, first, end)
        return rows

    def _read_into(
        self, out: Tensor, key: str, index: MetadataIndex, sizes: tuple[int, ...], first: int, end: int
    ) -> None:
        """Fill `out` with rows of a chunk."""
        place = self._places.get(index)
        if place is None:
            place = self._places[index] = self._find(key, index, sizes, out.dtype)
        if isinstance(place, Tensor):
            out.copy_(place.reshape(sizes or (1,))[first:end].reshape(out.shape))
            return
        row = math.prod(sizes[1:]) * out.itemsize
        buffer = out.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(buffer):
            got = os.preadv(place.file, [buffer[done:]], place.start + first * row + done)
            if not got:
                raise self._damaged(key, index, "the file ends before the tensor does")
            done += got
        if done == math.prod(sizes) * out.itemsize and zlib.crc32(buffer) != place.crc:
            raise self._damaged(key, index, "its bytes are not those whose CRC-32 was noted")

    def _find(
        self, key: str, index: MetadataIndex, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> _Place | Tensor:
        """Where a chunk's elements lie; the chunk itself where they do not lie row by row."""
        try:
            info = self._storage[index]
            name = str(info.relative_path)
            if name not in self._files:
                self._files[name] = os.open(self.state / name, os.O_RDONLY)
            file = self._files[name]
            with zipfile.ZipFile(_Slice(file, int(info.offset), int(info.length))) as archive:
                (pickled,) = (one for one in archive.namelist() if one.endswith("/data.pkl"))
                if not _is_plain(archive.read(pickled), sizes):
                    return self._load(file, info, sizes, dtype)
                data = archive.getinfo(pickled.removesuffix("data.pkl") + "data/0")
            expected = math.prod(sizes) * dtype.itemsize
            if data.compress_type != zipfile.ZIP_STORED or data.file_size != expected:
                raise ValueError(f"{data.file_size:,} bytes, where {expected:,} were expected")
            header = int(info.offset) + data.header_offset
            lengths = _LOCAL_HEADER.unpack(os.pread(file, _LOCAL_HEADER.size, header))
            place = _Place(file, header + _LOCAL_HEADER.size + sum(lengths), data.CRC)
            if sizes and sizes[0] > 1:
                self._check(place, expected)
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile, NotPlain) as error:
            raise self._damaged(key, index, error) from error
        return place

    def _check(self, place: _Place, length: int) -> None:
        """Hold a chunk that may be read in parts against its CRC-32."""
        crc = 0
        for start in range(0, length, _BLOCK):
            crc = zlib.crc32(os.pread(place.file, min(_BLOCK, length - start), place.start + start), crc)
        if crc != place.crc:
            raise ValueError("its bytes are not those whose CRC-32 was noted")

    def _load(self, file: int, info: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        archive = io.BytesIO(os.pread(file, int(info.length), int(info.offset)))
        loaded: Any = torch.load(archive, map_location="cpu", weights_only=True)
        if not isinstance(loaded, Tensor) or tuple(loaded.shape) != sizes or loaded.dtype != dtype:
            raise ValueError("it is another tensor than the .metadata says")
        return loaded.contiguous()

    def _damaged(self, key: str, index: MetadataIndex, why: object) -> CheckpointError:
        info = self._storage.get(index)
        name = getattr(info, "relative_path", "no file")
        span = f", bytes {info.offset:,} to {info.offset + info.length:,}" if info is not None else ""
        return CheckpointError(
            "A tensor of the checkpoint cannot be read.",
            where=f"{self.state / str(name)}{span}",
            found=f"{key}: {why}",
            do="copy the checkpoint again from where it is whole, or use another of the run",
        )


def _is_plain(pickled: bytes, sizes: tuple[int, ...]) -> bool:
    """Whether an archive's tensor is of these sizes and lies row by row from its storage's beginning.

    Raises:
        NotPlain: The pickle names what no tensor consists of.
        ValueError: It is of other sizes.
    """

    def tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> tuple[int, Any, Any]:
        return offset, tuple(size), tuple(stride)

    known: dict[str, Any] = {
        "persistent": lambda stored: stored,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "collections.OrderedDict": OrderedDict,
    }
    found = read_plain(
        pickled, known, inert=lambda name: name.startswith("torch.") and name.endswith("Storage")
    )
    if not isinstance(found, tuple) or len(found) != 3 or found[1] != sizes:
        raise ValueError("it is another tensor than the .metadata says")
    strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    rows = all(a == b or n == 1 for a, b, n in zip(found[2], strides, sizes, strict=True))
    return bool(found[0] == 0 and rows)


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._length - self._at))
        got = os.preadv(self._file, [view[:size]], self._start + self._at) if size else 0
        self._at += got
        return got
