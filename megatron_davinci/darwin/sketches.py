"""Arrays on disk, whole or not at all, and names in them."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.darwin.parts import TEMPORARY
from megatron_davinci.files import disk_errors

_ALIGNMENT = 64
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
"""A 128-bit key; zeros stand for none, which no digest is."""


def save(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to `path.NAME.npy`, each whole or not at all.

    Raises:
        EnvironmentProblem: The disk is full or fails.
    """
    for name, array in arrays.items():
        target = path.with_name(f"{path.name}.{name}.npy")
        beside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{target.name}")
        with disk_errors(target, f"writing {target.name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "xb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)


def save_sketch(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to one file, `path.sketch`, whole or not at all: a task's sketches are as often small as large.

    The file begins with the length of a JSON header (uint64, little-endian) and the header: of each array its dtype,
    shape and place. Arrays lie on multiples of 64 bytes.

    Raises:
        EnvironmentProblem: The disk is full or fails.
    """
    places: dict[str, list[Any]] = {}
    end = 0
    for name, array in arrays.items():
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + array.nbytes
        places[name] = [np.lib.format.dtype_to_descr(array.dtype), list(array.shape), begin]
    header = json.dumps(places).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    target = path.with_name(f"{path.name}.sketch")
    beside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{target.name}")
    with disk_errors(target, f"writing {target.name}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            written = 0
            for name, array in arrays.items():
                begin = places[name][2]
                file.write(bytes(begin - written))
                file.write(np.ascontiguousarray(array).data.cast("B") if array.nbytes else b"")
                written = begin + array.nbytes
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)


class Arrays:
    """What `save` or `save_sketch` wrote, by name; mapped when it is asked for, not read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: dict[str, NDArray[Any]] = {}
        self._places: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._loaded:
            together = self._path.with_name(f"{self._path.name}.sketch")
            if together.exists():
                self._loaded[name] = self._map(together, name)
            else:
                file = self._path.with_name(f"{self._path.name}.{name}.npy")
                self._loaded[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        return self._loaded[name]

    def _map(self, file: Path, name: str) -> NDArray[Any]:
        if self._places is None:
            with open(file, "rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                self._places = json.loads(opened.read(size))
            self._begin = 8 + size
        described, shape, place = self._places[name]
        if isinstance(described, list):
            described = [tuple(field) for field in described]
        dtype = np.dtype(described)
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", self._begin + place, tuple(shape))

    def name(self, index: int) -> str:
        """The string at an index of what `names` packed."""
        begin, end = self["name_ends"][index : index + 2]
        return self["names"][begin:end].tobytes().decode("utf-8", "surrogatepass")


def names(strings: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Strings as two arrays for `save`: their bytes one behind another, and where each begins and ends."""
    encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {"names": np.frombuffer(b"".join(encoded), np.uint8), "name_ends": ends}


def first_of_each(keys: NDArray[Any]) -> NDArray[np.int64]:
    """For each key, the place of the first that is equal; its own where none was before, or it is no key.

    Args:
        keys: Of dtype `KEY`, [n].

    Returns:
        int64 [n].
    """
    # Equal keys stand together and keep their order, so the first of each run is the first of all.
    order = np.lexsort((keys["high"], keys["low"]))
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    same &= (ordered["high"][1:] != 0) | (ordered["low"][1:] != 0)
    first = np.arange(len(order))
    first[1:][same] = 0
    np.maximum.accumulate(first, out=first)
    found = np.empty(len(order), np.int64)
    found[order] = order[first]
    return found
