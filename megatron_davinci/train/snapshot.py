"""This rank's part of a run's state as it is at one moment, and how it becomes Megatron-Core's `torch_dist` files.

Taking it is done by all ranks together and touches no file. Writing it is one rank's own work and needs no other
rank, so that it can be done in the background. What the ranks have written is put together by rank 0.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    SerializationFormat,
    _StorageInfo,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_davinci.platform.gathered_state import GatheredState
from megatron_davinci.platform.host_copy import HostCopy
from megatron_davinci.train.checkpoint import CONTENT, sharded_state
from megatron_davinci.train.new_files import NewFiles

Place = list[Any]
"""Where an item lies, as JSON: name, offset in the tensor, index, file, first byte, bytes."""


class _Writer(FileSystemWriterAsync):
    """Megatron-Core's writer, which plans without touching the file system: ranks that plan wait for each other."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: Any) -> None:
        # Megatron-Core's copies each part of a larger tensor; here it is copied into the host's memory, or as it is
        # written.
        items = [(item, planner.resolve_data(item)) for item in plan.items]
        described = [(item, data) for item, data in items if item.type == WriteItemType.BYTE_IO]
        tensors = [(item, data.detach()) for item, data in items if item.type != WriteItemType.BYTE_IO]
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self.write_buckets = (
            [(str(Path(self.checkpoint_dir) / name), name, (described, tensors))] if items else []
        )


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes.

    Attributes:
        writer: Megatron-Core's, with the buckets of items that this rank writes: a file each.
        metadata: What all ranks write; on rank 0.
        common: The state that is no tensor; on rank 0.
        copied: Whether it is a copy, so that training may go on before it is written.
    """

    writer: _Writer
    metadata: Metadata | None
    common: bytes | None
    copied: bool = False

    def copy(self, host: HostCopy, gathered: GatheredState) -> Snapshot:
        """A copy of it in the host's memory, so that training may change the originals.

        Args:
            host: Keeps the memory.
            gathered: What it holds is a copy already.

        Returns:
            The copy, which lasts until the next one; itself where the host has no room for it.
        """
        tensors = [tensor for _, _, (_, items) in self.writer.write_buckets for _, tensor in items]
        copied = gathered.storages()
        live = [tensor.untyped_storage().data_ptr() not in copied for tensor in tensors]
        copies = host.take([tensor for tensor, is_live in zip(tensors, live, strict=True) if is_live])
        if copies is None:
            return self
        taken = iter(copies)
        safe = iter(
            [next(taken) if is_live else tensor for tensor, is_live in zip(tensors, live, strict=True)]
        )
        self.writer.write_buckets = [
            (path, name, (described, [(item, next(safe)) for item, _ in items]))
            for path, name, (described, items) in self.writer.write_buckets
        ]
        return replace(self, copied=True)

    def write(self, files: NewFiles) -> list[Place]:
        """Write this rank's part, and see that the disk has it.

        Args:
            files: The checkpoint's files of this rank.

        Returns:
            Where each item lies.

        Raises:
            OSError: The file system refused something.
            EnvironmentProblem: The disk holds something else than what was written.
        """
        places: list[Place] = []
        try:
            for path, name, (described, items) in self.writer.write_buckets:
                with files.open(path) as stream:
                    places += [self._write_item(stream, name, *one) for one in (*described, *items)]
            if self.common is not None:
                files.write(Path(self.writer.checkpoint_dir) / COMMON_STATE_FNAME, self.common)
        except Exception as error:
            # torch's archive writer raises an error of its own for what the file system refused.
            if files.failure is None or files.failure is error:
                raise
            raise files.failure from error
        files.read_back()
        return places

    def finish(self, files: NewFiles, places: Sequence[Sequence[Place]]) -> None:
        """Write what says where everything lies; on rank 0, once every rank has written.

        Args:
            files: The checkpoint's files of this rank.
            places: What `write` has returned on each rank.

        Raises:
            OSError: The file system refused something.
        """
        assert self.metadata is not None
        self.writer.fs = _Recorded(files)
        self.writer.finish(self.metadata, [[_result(place) for place in one] for one in places])
        config = CheckpointingConfig("torch_dist", 1)
        files.write(Path(self.writer.checkpoint_dir) / CONFIG_FNAME, json.dumps(asdict(config)).encode())

    def _write_item(self, stream: Any, name: str, item: Any, data: Any) -> Place:
        if isinstance(data, torch.Tensor):
            data = data.to("cpu")
            if data.untyped_storage().size() != data.numel() * data.itemsize:
                data = data.clone()  # of a part, torch would write the whole
        done = _write_item(self.writer.transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
        index, stored = done.index, done.storage_data
        offset = None if index.offset is None else list(index.offset)
        return [index.fqn, offset, index.index, stored.relative_path, stored.offset, stored.length]


def take(
    chunks: Sequence[Any], optimizer: Any, folder: Path, gathered: GatheredState | None = None
) -> Snapshot:
    """This rank's part of the state; every rank calls this.

    Args:
        chunks: The model chunks, not wrapped.
        optimizer: Megatron-Core's optimizer.
        folder: The `state` folder that it is to be written in.
        gathered: Where the optimizer's state is gathered; it lasts until that is used again.
    """
    with warnings.catch_warnings(), (gathered or GatheredState()).used_by(optimizer):
        warnings.simplefilter("ignore", FutureWarning)
        state = {**sharded_state(chunks, optimizer), "content_metadata": dict(CONTENT)}
        sharded, common = save_preprocess(state, True)
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        writer = _Writer(str(folder), thread_count=1)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(named, False), writer, None, 0, planner=planner
        )
    metadata: Metadata | None = planned[0][1]
    content = None
    if metadata is not None:
        buffer = io.BytesIO()
        torch.save(common, buffer)
        content = buffer.getvalue()
    return Snapshot(writer, metadata, content)


def _result(place: Place) -> WriteResult:
    name, offset, index, file, first, length = place
    at = None if offset is None else torch.Size(offset)
    return WriteResult(MetadataIndex(name, at, index), length, _StorageInfo(file, first, length))


class _Recorded(FileSystem):
    """The file system as torch's writer uses it, which notes the digest of what is written."""

    def __init__(self, files: NewFiles) -> None:
        super().__init__()
        self._files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with self._files.open(path, mode) as file:
            yield file

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self._files.renamed(path, new_path)
