"""The `.metadata` of a `torch.distributed.checkpoint`, read without running anything that is in it.

It is a pickle, which torch loads as one: a file from elsewhere could run any program. Here it may name the classes
that such a file consists of, and nothing else. `megatron_patches` has Megatron-Core read by this too.
"""

from __future__ import annotations

import io
import pathlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_davinci.platform.safe_pickle import Build, NotPlain, read_plain

_PLANNERS = "torch.distributed.checkpoint."


class SafeReader(FileSystemReader):
    """torch's reader of checkpoints, but for how it reads the `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """What is in the checkpoint.

        Raises:
            NotPlain: The file holds anything but that.
        """
        rank = kwargs.get("rank")
        path = self._get_metadata_path(rank)
        found = read_metadata(Path(str(path)))
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        if found.planner_data is None:
            found.planner_data = {}
        return found


def load_bytes(planner: Any, item: Any, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes`, but for how it loads: only classes that are known to be safe.

    Raises:
        pickle.UnpicklingError: The bytes name another.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals([*SAFE_GLOBALS, ShardedObject]):
        loaded = torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[item.dest_index.fqn], loaded)
    else:
        planner.state_dict[item.dest_index.fqn] = loaded


def read_metadata(path: Path) -> metadata.Metadata:
    """What a `.metadata` file says.

    Raises:
        NotPlain: It holds anything else, or is damaged.
    """
    known, states = _allowed()
    with open(path, "rb") as file:
        # What a planner has left there is passed over.
        found = read_plain(file.read(), known, states, lambda name: name.startswith(_PLANNERS))
    said, storage = (getattr(found, name, None) for name in ("state_dict_metadata", "storage_data"))
    if (
        type(found) is not metadata.Metadata
        or not isinstance(said, dict)
        or not isinstance(storage, dict | None)
    ):
        raise NotPlain(f"a {type(found).__name__}, where a checkpoint's metadata was expected")
    kinds = (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata)
    if not all(type(entry) in kinds for entry in said.values()):
        raise NotPlain("an entry that is neither a tensor nor bytes")
    # What a file's entries point to lies beside it. A path that leads elsewhere would have other files read.
    for entry in (storage or {}).values():
        name = getattr(entry, "relative_path", None)
        if type(entry) is not _StorageInfo or not isinstance(name, str):
            raise NotPlain("an entry that does not say where it is stored")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise NotPlain(f"an entry that is stored in {name}")
    return found


@cache
def _allowed() -> tuple[dict[str, Build], dict[type, Callable[[Any, Any], None]]]:
    plain = [
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.StorageMeta,
        metadata.MetadataIndex,
        _StorageInfo,
    ]
    known: dict[str, Build] = {f"{one.__module__}.{one.__qualname__}": one for one in plain}
    known[f"{metadata.TensorProperties.__module__}.TensorProperties"] = metadata.TensorProperties
    encoding = metadata._MEM_FORMAT_ENCODING
    known[f"{encoding.__module__}.{encoding.__qualname__}"] = encoding
    known["torch.Size"] = torch.Size
    known["collections.OrderedDict"] = OrderedDict
    # As text: who reads a checkpoint does not need them as paths.
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath"):
            known[f"{module}.{name}"] = _path
    # Dtypes and layouts stand for themselves, by this function of torch's or as names.
    known["torch.serialization._get_layout"] = _layout
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype | torch.layout):
            known[f"torch.{name}"] = value  # type: ignore[assignment]
    states: dict[type, Callable[[Any, Any], None]] = dict.fromkeys(plain, _set_fields)
    states[metadata.TensorProperties] = metadata.TensorProperties.__setstate__
    return known, states


def _set_fields(target: Any, state: Any) -> None:
    """Set attributes as unpickling would, but none that the class does not have."""
    assert is_dataclass(target)
    if not isinstance(state, dict):
        raise NotPlain(f"a {type(target).__name__} whose fields are a {type(state).__name__}")
    # Megatron-Core puts what it wants to know again beside the fields of the whole.
    names = {one.name for one in fields(target)} | {"mcore_data"}
    for name in names & state.keys():
        object.__setattr__(target, name, state[name])


def _layout(name: str) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise NotPlain(f"the layout {name!r}")
    return found


def _path(*parts: str) -> str:
    # Texts only: a tuple of itself and itself, and so on, is a small pickle and an endless text.
    if not all(isinstance(part, str) for part in parts):
        raise NotPlain("a path of anything but text")
    return str(pathlib.PurePosixPath(*parts))
