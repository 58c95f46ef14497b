"""Writing tensors as Megatron-Core's `torch_dist` files, in one process, a layer of a tensor in memory at a time."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_davinci.files import disk_errors


class Source(NamedTuple):
    """A tensor that is read when it is written.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        read: Gives it.
        layer: Gives a layer of it by number, where the first axis is that of layers; each is then written by itself.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    layer: Callable[[int], Tensor] | None = None


def write_state(
    folder: Path, tensors: Mapping[str, Source], opened: Callable[[str, str], IO[bytes]] = open
) -> None:
    """Write a checkpoint's `state` that holds these weights and nothing else.

    Args:
        folder: The folder, which exists and is empty.
        tensors: What to write, by stored key; weights of layers have the layers as their first axis.
        opened: Opens the large files, given name and mode.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """
    described = {
        key: torch.empty(source.shape, dtype=source.dtype, device="meta") for key, source in tensors.items()
    }
    writer = _Writer(str(folder), single_file_per_rank=True, sync_files=False)
    writer.fs = _Files(opened)
    with disk_errors(folder, "writing a checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.save(described, storage_writer=writer, planner=_Late(tensors), no_dist=True)
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        torch.save({}, folder / "common.pt")
        said: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        said |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(said))


class _Late(dcp.DefaultSavePlanner):
    """Reads a tensor, or a layer of it, when it is its turn to be written."""

    def __init__(self, tensors: Mapping[str, Source]) -> None:
        super().__init__()
        self._tensors = tensors

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        return self.plan

    def _parts(self, item: WriteItem) -> Iterator[WriteItem]:
        source, data = self._tensors[item.index.fqn], item.tensor_data
        if source.layer is None or data is None:
            yield item
            return
        for layer in range(source.shape[0]):
            offsets = torch.Size([layer, *[0] * (len(source.shape) - 1)])
            chunk = ChunkStorageMetadata(offsets, torch.Size([1, *source.shape[1:]]))
            index = MetadataIndex(item.index.fqn, offsets, layer)
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk))

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        source, index = self._tensors[write_item.index.fqn], write_item.index
        if source.layer is None or index.offset is None:
            return source.read().contiguous()
        return source.layer(index.offset[0])[None].contiguous()


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which names nothing after chance or a place: the same tensors give the same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Files(FileSystem):
    """The file system, with files that hash what is written to them."""

    def __init__(self, opened: Callable[[str, str], IO[bytes]]) -> None:
        super().__init__()
        self._opened = opened

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if not str(path).endswith(".distcp"):
            with super().create_stream(path, mode) as file:
                yield file
            return
        with self._opened(str(path), mode) as file:
            yield file
