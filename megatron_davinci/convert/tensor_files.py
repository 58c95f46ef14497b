"""Reading and writing safetensors files a tensor at a time.

The library maps a whole file, and writes a whole one from tensors in memory. Here a tensor is read by its byte range,
so that memory is bounded by one tensor, and files are planned before anything is read, so that they are the same to
the byte however often a conversion was interrupted. The format is in the library's README.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_davinci.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_AGAIN = "download or copy the file again"


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Tensors:
    """The tensors of a Hugging Face folder: one safetensors file, or several with an index.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: There are none, a file is missing or cut short, or its header is damaged; all such files are
            listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names, weight_map = _files_of(folder)
        self._found: dict[str, Stored] = {}
        problems = []
        for name in names:
            try:
                self._found |= _read_header(folder / name)
            except CheckpointError as error:
                problems.append(error)
        if problems:
            raise problems[0] if len(problems) == 1 else _together(folder, problems)
        if weight_map is not None:
            lost = [
                f"{name}: in {file} by the index"
                for name, file in weight_map.items()
                if name not in self._found or self._found[name].path.name != file
            ]
            if lost:
                raise CheckpointError(
                    "Tensors are not in the files that the index says.",
                    where=folder / INDEX,
                    found="\n".join(lost[:10]),
                    do=_AGAIN,
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Stored:
        return self._found[name]

    def read(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Read a tensor, or rows of it.

        Args:
            name: Its name.
            first: Its first row.
            end: One past its last row; default: all that follow.
        """
        path, dtype, shape, start = self._found[name]
        if shape:
            end = shape[0] if end is None else end
            start += first * math.prod(shape[1:]) * dtype.itemsize
            shape = (end - first, *shape[1:])
        out = torch.empty(shape, dtype=dtype)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            buffer = out.reshape(-1).view(torch.uint8).numpy().data
            done = 0
            while done < len(buffer):
                got = file.readinto(buffer[done:])
                if not got:
                    raise _cut_short(path, start + done, start + len(buffer))
                done += got
        return out


def _files_of(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The folder's files, and which tensor is in which, if it says so.

    Where one file and an index are both there transformers loads the one file. A model that was saved over a larger
    one lies so: the index is the old model's.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE], None
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
            if any(Path(name).name != name or name in ("", "..") for name in names):
                raise ValueError("a file outside of the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "The index of the tensors cannot be read.", where=folder / INDEX, found=error, do=_AGAIN
            ) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                "Files of the model are missing.",
                where=folder,
                found="\n".join(_half_there(folder, name) for name in missing),
                expected=f"the {len(names)} files that {INDEX} names",
                do="download the rest of the model",
            )
        return names, weight_map
    others = sorted(
        path.name
        for path in folder.glob("*")
        if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    raise CheckpointError(
        "There are no weights here that can be read.",
        where=folder,
        found=", ".join(others) or "no weights at all",
        expected=f"{SINGLE}, or several files and {INDEX}",
        do="save the model with transformers' save_pretrained: pickled weights are not read here, "
        "since a pickle can run any program"
        if others
        else "check the path; a model on the hub is fetched with `hf download`",
    )


def _half_there(folder: Path, name: str) -> str:
    half = [path.name for path in folder.glob(f"{name}*") if path.name != name]
    return f"{name}: missing" + (f", {half[0]} is there" if half else "")


def _together(folder: Path, problems: Sequence[CheckpointError]) -> CheckpointError:
    return CheckpointError(
        "Files of the model are damaged.",
        where=folder,
        found="\n".join(f"{Path(str(one.where)).name}: {one.what} {one.found}" for one in problems),
        do="download or copy these files again",
    )


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        if first.startswith(b"version "):
            raise CheckpointError(
                "This is not a file of weights but a pointer to one.",
                where=path,
                found="a Git LFS pointer",
                do="run `git lfs pull` in the folder",
            )
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > _LARGEST_HEADER or (size < 8 + length and length < 2):
            raise CheckpointError(
                "This is no safetensors file.",
                where=path,
                found=f"{size:,} bytes, which begin with {first!r}",
                do=_AGAIN,
            )
        if size < 8 + length:
            raise _cut_short(path, size, 8 + length)
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        found = {}
        ends = [0]
        for name, said in header.items():
            start, end = said["data_offsets"]
            dtype, shape = DTYPES.get(said["dtype"]), tuple(int(n) for n in said["shape"])
            if dtype is None:
                raise ValueError(f"{name}: the dtype {said['dtype']}")
            if end - start != math.prod(shape) * dtype.itemsize or start < 0 or min(shape, default=0) < 0:
                raise ValueError(
                    f"{name}: {end - start:,} bytes for the shape {list(shape)} in {said['dtype']}"
                )
            found[name] = Stored(path, dtype, shape, 8 + length + start)
            ends.append(end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "The header of a safetensors file cannot be read.", where=path, found=error, do=_AGAIN
        ) from error
    if size < 8 + length + max(ends):
        raise _cut_short(path, size, 8 + length + max(ends))
    return found


def _cut_short(path: Path, found: int, expected: int) -> CheckpointError:
    return CheckpointError(
        "A file of weights was cut short.",
        where=path,
        found=f"{found:,} bytes",
        expected=f"{expected:,} bytes",
        do="go on with the download, or copy the file again",
    )


class Planned(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(planned: Sequence[Planned]) -> bytes:
    """What stands before the tensors of a file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in planned:
        header[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.bytes],
        }
        at += one.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def content_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in the order in which they are written."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def cast(tensor: Tensor, dtype: torch.dtype, name: str, where: object) -> Tensor:
    """A tensor in another dtype.

    Args:
        tensor: The tensor.
        dtype: The dtype.
        name: The tensor's, for the message.
        where: What it was read from, likewise.

    Raises:
        CheckpointError: A finite value of it would be infinite.
    """
    out = tensor.to(dtype)
    if out.dtype != tensor.dtype and not out.isfinite().all():
        lost = out.isinf() & tensor.isfinite()
        if lost.any():
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"A weight is too large for {kind}.",
                where=where,
                found=f"{name}: {int(lost.sum()):,} values, the largest {float(tensor[lost].abs().max()):.4g}",
                expected=f"at most {torch.finfo(dtype).max:.4g}",
                do="convert to bfloat16 or float32",
            )
    return out


def fsync(path: Path) -> None:
    """Have a file on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
